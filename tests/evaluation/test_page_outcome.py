"""The main figures of runs, and the difference of two."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.evaluation.page_outcome import acceptance, comparison, tiles
from engine.evaluation.run_record import RunRecord


def run_with(name: str, after: dict[str, Any] | None = None, **metrics: Any) -> RunRecord:
    summary = None if after is None else {"after": {"num_prompts": 9} | after}
    return RunRecord(Path(name), [{"step": 1} | metrics], [], [], [], summary, None, "")


def differences(*runs: RunRecord) -> dict[str, list[str]]:
    rows = re.findall(r"<tr>(<td>.*?)</tr>", comparison(runs))
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    return {name: rest for name, *rest in cells}


def test_the_difference_is_in_percent_and_says_which_run_is_better():
    one = run_with("a", loss=2.0, tokens_per_s=100.0, step_s=1.0, mfu=0.4, memory_gib=8.0)
    two = run_with("b", loss=1.5, tokens_per_s=110.0, step_s=1.0, mfu=0.3, grad_norm=2.0)
    assert differences(one, two) == {
        "loss": ["2", "1.5", "-25.0%", "better"],
        "tokens/s": ["100", "110", "+10.0%", "better"],
        "seconds per step": ["1", "1", "+0.0%", "equal"],
        "model FLOPs utilization": ["0.4", "0.3", "-25.0%", "worse"],
    }
    assert comparison([one]) == comparison([run_with("a"), run_with("b")]) == ""


def test_figures_of_the_drafts_ranks_are_not_judged_if_the_target_runs_elsewhere():
    one = run_with("a", mfu=0.4, joules_per_million_tokens=9.0, loss=2.0)
    two = run_with("b", mfu=0.3, joules_per_million_tokens=5.0, loss=1.0)
    name = "joules per million tokens"
    assert differences(one, two)[name][-1] == "better"
    others = [
        replace(two, config="overlap: {placement: split}"),
        replace(two, config="target: {store: /s}"),
        replace(two, work={"draft_ranks": 4, "target_ranks": 0}),
    ]
    for other in others:
        found = differences(one, other)
        assert found[name][-1].startswith("no verdict") and found["model FLOPs utilization"][-1].startswith("no verdict")
        assert found["loss"][-1] == "better"


def measured(length: float, confidence: float | None) -> RunRecord:
    return run_with(f"run of {length}", {"acceptance_length": length, "confidence": confidence})


def test_acceptance_lengths_differ_only_beyond_their_intervals():
    name = "acceptance length, measured"
    near = differences(measured(2.0, 0.3), measured(2.4, 0.3))[name]
    assert near == ["2.00 ± 0.30", "2.40 ± 0.30", "+20.0%", "within the 95% confidence interval of the difference"]
    assert differences(measured(3.0, 0.3), measured(2.4, 0.3))[name][-2:] == ["-20.0%", "worse"]
    assert differences(measured(2.0, None), measured(2.4, 0.3))[name][-1] == "better; too few prompts for an interval"


def test_what_was_not_measured_is_left_out():
    run = run_with("a", {"acceptance_length": None}, loss=3.0)
    assert acceptance([run]) == "" and "acceptance length" not in tiles(run, [run]) and "<b>3</b>" in tiles(run, [run])
    after = {"acceptance_length": 2.5, "acceptance_per_depth": [0.5, None], "tokens_per_s": 3.0, "plain_tokens_per_s": 2.0}
    shown = acceptance([run_with("a", after)])
    assert "<td>50% -</td><td>1.50x</td><td>9</td>" in shown


def test_acceptance_of_a_part_of_a_block_is_said_to_be_one(tmp_path):
    after = {"acceptance_length": 2.0, "acceptance_per_depth": [0.5, 0.4]}
    run = replace(run_with("a", after), folder=tmp_path)
    assert "of a block" not in acceptance([run]), "the draft is not there"
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "model.safetensors").touch()
    for block_size, is_part in ((3, False), (8, True)):
        config = {"architectures": ["DFlashDraftModel"], "block_size": block_size}
        (tmp_path / "draft" / "config.json").write_text(json.dumps(config))
        assert ("with 2 of the 7 tokens of a block" in acceptance([run])) == is_part
