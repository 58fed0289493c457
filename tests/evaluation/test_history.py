"""Evaluations during training choose the draft that is exported, and may end the run."""

import json
from pathlib import Path

import pytest

from engine.evaluation.acceptance import AcceptanceCounts
from engine.evaluation.history import Evaluation, EvaluationHistory
from engine.runtime.training_loop import RunSpan, Segment
from tests.distributed import launch
from tests.test_trainer import arguments, metrics, run


def evaluation(step: int, length: float) -> Evaluation:
    return Evaluation(step, length, 0.1, [0.5], 4)


def test_the_earliest_of_the_best_is_kept_and_a_resumed_run_knows_those_before_its_checkpoint(tmp_path):
    history = EvaluationHistory(tmp_path, 0)
    assert [history.add(evaluation(step, length)) for step, length in ((2, 1.1), (4, 1.5), (6, 1.5), (8, 1.4))] == [
        *(True, True, False, False)
    ]
    history.write()
    assert history.best.step == 4 and history.num_without_gain() == 2
    resumed = EvaluationHistory(tmp_path, 6)
    assert resumed.best.step == 4 and resumed.num_without_gain() == 1
    assert resumed.add(evaluation(8, 1.6)) and resumed.num_without_gain() == 0
    assert EvaluationHistory(tmp_path, 0).best is None, "a new run forgets those of an earlier one"


@pytest.mark.parametrize(
    ("span", "every", "expected"),
    [
        (RunSpan(0, 7), 0, [(1, 7)]),
        (RunSpan(0, 7), 3, [(1, 3), (4, 6), (7, 7)]),
        (RunSpan(4, 7), 3, [(5, 6), (7, 7)]),
        (RunSpan(3, 6), 3, [(4, 6)]),
        (RunSpan(6, 6), 3, []),
    ],
)
def test_segments_end_at_evaluations(span, every, expected):
    assert list(span.segments(every)) == [Segment(*steps) for steps in expected]


def test_the_confidence_interval_is_that_of_a_ratio_of_sums():
    """Against prompts drawn again and again: 95 of 100 intervals hold the true ratio."""
    import random

    generator = random.Random(0)
    hits = 0
    for _ in range(400):
        counts = AcceptanceCounts.zero(1)
        for _ in range(60):
            forwards = generator.randrange(10, 40)
            tokens = sum(generator.choice((1, 2, 3)) for _ in range(forwards))
            squares = {"squared_tokens": tokens**2, "squared_forwards": forwards**2, "tokens_by_forwards": tokens * forwards}
            counts += AcceptanceCounts((0,), (0,), 1, tokens, forwards, **squares)
        report = counts.report()
        hits += abs(report.acceptance_length - 2) < report.confidence
    assert 0.91 < hits / 400 < 0.985
    assert AcceptanceCounts((0,), (0,), 1, 10, 5).report().confidence is None


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("placement", ["auto", "split"])
def test_evaluating_during_training_changes_nothing_but_the_draft_that_is_kept(placement, tmp_path, tiny_target, tiny_corpus):
    options = ["max_steps=5"]
    ranks = 1
    if placement == "split":
        options += ["overlap.placement=split", "overlap.target_ranks=1"]
        ranks = 2
    plain = tmp_path / "plain"
    run([*arguments(plain, tiny_target, tiny_corpus), *options], ranks)
    folder = tmp_path / "evaluated"
    command = [*arguments(folder, tiny_target, tiny_corpus), *options, "evaluation.every_steps=2"]
    printed = run(command, ranks)
    assert metrics(folder) == metrics(plain)
    assert [line["step"] for line in lines_of(folder)] == [2, 4, 5]
    last = (folder / "draft_last" / "model.safetensors").read_bytes()
    assert last == (plain / "draft" / "model.safetensors").read_bytes()
    best = max(lines_of(folder), key=lambda line: line["acceptance_length"])
    assert f"the draft of step {best['step']}" in printed
    after = json.loads((folder / "summary.json").read_text())["after"]
    assert after["acceptance_length"] == best["acceptance_length"]


def test_a_run_ends_when_its_patience_does_and_stays_ended(tmp_path, tiny_target, tiny_corpus):
    """With a learning rate of nothing no draft is better than the first."""
    command = [*arguments(tmp_path, tiny_target, tiny_corpus), "epochs=4", "evaluation.every_steps=2", "evaluation.patience=2"]
    frozen = json.loads(Path("ds_configs/zero3.json").read_text())
    frozen["optimizer"]["params"]["lr"] = 1e-12
    (tmp_path / "ds.json").write_text(json.dumps(frozen))
    command[command.index("ds_configs/zero3.json")] = str(tmp_path / "ds.json")
    printed = run(command)
    assert "ends early: 2 evaluations brought no better draft" in printed
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4, 6]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_6"
    again = launch([*command, "checkpoint.resume=true"])
    assert again.returncode == 0 and len(metrics(tmp_path)) == 6, again.stderr
