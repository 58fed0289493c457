"""Evaluations during training choose the draft that is exported, and may end the run."""

import json
import random
from pathlib import Path

import pytest

from engine.config.sections import EvaluationSection
from engine.evaluation.acceptance import AcceptanceCounts, students_quantile
from engine.evaluation.decoding import Generation
from engine.evaluation.history import Evaluation, EvaluationHistory
from engine.host.checkpoint_files import problem_of
from engine.runtime.training_loop import Annealing, Segment
from tests.distributed import launch
from tests.test_trainer import arguments, metrics, run
from tests.tiny_target import TinyCorpus


def evaluation(step: int, length: float, draft_tokens: int = 5) -> Evaluation:
    return Evaluation(step, length, 0.1, [0.5], 4, draft_tokens, 64)


DEFAULTS = EvaluationSection()


def read(
    folder: Path, first_step: int, warnings: list[str] | None = None, section: EvaluationSection = DEFAULTS
) -> EvaluationHistory:
    return EvaluationHistory.read(folder, first_step, section, [].append if warnings is None else warnings.append)


def test_the_earliest_of_the_best_is_kept_and_a_resumed_run_knows_those_before_its_checkpoint(tmp_path):
    history = EvaluationHistory()
    lengths = ((2, 1.1), (4, 1.5), (6, 1.5), (8, 1.4))
    assert [history.add(evaluation(step, length)) for step, length in lengths] == [True, True, False, False]
    history.write(tmp_path)
    assert history.best.step == 4 and history.first_without_gain(2) == 8 and history.first_without_gain(3) is None
    resumed = read(tmp_path, 6)
    assert resumed.best.step == 4 and resumed.first_without_gain(1) == 6 and resumed.has(6) and not resumed.has(8)
    assert resumed.add(evaluation(8, 1.6)) and resumed.first_without_gain(2) is None
    assert resumed.first_without_gain(1) == 6, "that the run was to end is not forgotten when a later draft is better"
    assert read(tmp_path, 0).best is None, "a new run forgets those of an earlier one"


def test_after_steps_that_are_taken_again_the_next_draft_is_the_best(tmp_path):
    """`draft` holds one of the steps that are taken again, and the best one before them is gone."""
    history = EvaluationHistory()
    for step, length in ((2, 1.5), (4, 1.8)):
        history.add(evaluation(step, length))
    history.write(tmp_path)
    resumed = read(tmp_path, 2)
    assert resumed.best is None and resumed.last.step == 2
    assert resumed.add(evaluation(4, 1.4)) and resumed.best.step == 4
    resumed.write(tmp_path)
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4]
    again = read(tmp_path, 4)
    assert again.best.step == 4 and [evaluation.step for evaluation in again.earlier] == [2], "step 2 does not come back"


def test_lengths_with_other_settings_are_not_compared(tmp_path):
    history = EvaluationHistory()
    history.add(evaluation(2, 2.5))
    assert history.add(evaluation(4, 1.5, draft_tokens=2)) and history.best.step == 4
    history.write(tmp_path)
    section = EvaluationSection(num_steps=2)
    assert read(tmp_path, 4, section=section).best.step == 4
    EvaluationHistory([evaluation(2, 2.5), evaluation(4, 1.5, draft_tokens=2)]).write(tmp_path)
    warnings = []
    assert read(tmp_path, 4, warnings, section).best.step == 4 and len(warnings) == 1
    by_loss = EvaluationSection(num_steps=2, best_by="loss")
    assert read(tmp_path, 4, [], by_loss).best is None, "the run resumes under another criterion"


def test_an_early_end_that_was_decided_holds_after_steps_that_are_taken_again(tmp_path):
    history = EvaluationHistory()
    for step, length in ((2, 1.5), (4, 1.4), (6, 1.3), (8, 1.8)):
        history.add(evaluation(step, length))
    assert history.first_without_gain(2) == 6
    history.write(tmp_path)
    resumed = read(tmp_path, 6)
    assert resumed.best is None and resumed.first_without_gain(2) == 6
    assert not resumed.has(6) and resumed.add(evaluation(6, 1.3)), "it is evaluated again"
    assert resumed.first_without_gain(2) == 6 and resumed.first_without_gain(3) is None, "and counts once"


@pytest.mark.parametrize(("step", "last", "expected"), [(0, 7, (1, 3)), (4, 7, (5, 6)), (3, 6, (4, 6)), (6, 7, (7, 7))])
def test_a_segment_ends_at_an_evaluation_or_at_the_end(step, last, expected):
    assert Segment.after(step, 3, last) == Segment(*expected)


def test_the_learning_rate_falls_at_the_end_only():
    assert [Annealing(10, 3).factor(step) for step in (1, 7, 8, 9, 10)] == [1, 1, 0.75, 0.5, 0.25]
    assert Annealing(10, 0).factor(10) == 1


def reply(generator: random.Random, num_forwards: int) -> Generation:
    """A reply of which each forward accepted none, one or two of two drafted tokens, 1 on average."""
    accepted = [generator.choice((0, 1, 2)) for _ in range(num_forwards)]
    num_tokens = 1 + sum(count + 1 for count in accepted)
    return Generation([0] * num_tokens, num_forwards, [2] * num_forwards, accepted, 0.0)


@pytest.mark.parametrize("num_prompts", [6, 60])
def test_the_confidence_interval_is_that_of_a_ratio_of_sums(num_prompts):
    """Against prompts drawn again and again: 95 of 100 intervals hold the true ratio."""
    generator = random.Random(0)
    hits = 0
    for _ in range(400):
        counts = AcceptanceCounts.zero(2)
        for _ in range(num_prompts):
            counts += AcceptanceCounts.of(reply(generator, generator.randrange(10, 40)), None, 2)
        report = counts.report()
        hits += abs(report.acceptance_length - 2) < report.confidence
    assert 0.92 < hits / 400 < 0.98
    assert AcceptanceCounts.of(reply(generator, 20), None, 2).report().confidence is None


@pytest.mark.parametrize(("degrees", "expected"), [(4, 2.776), (5, 2.571), (10, 2.228), (23, 2.069), (100, 1.984)])
def test_students_quantile_is_the_table_s(degrees, expected):
    assert students_quantile(degrees) == pytest.approx(expected, rel=3e-3)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


HELD_OUT_LOSSES: dict[str, list[float]] = {}


@pytest.mark.parametrize("placement", ["auto", "two ranks", "split"])
def test_evaluating_during_training_changes_nothing_but_the_draft_that_is_kept(placement, tmp_path, tiny_target, tiny_corpus):
    options = ["max_steps=5"]
    ranks = 1
    if placement != "auto":
        ranks = 2
    if placement == "split":
        options += ["overlap.placement=split", "overlap.target_ranks=1"]
    plain = tmp_path / "plain"
    run([*arguments(plain, tiny_target, tiny_corpus), *options], ranks)
    folder = tmp_path / "evaluated"
    command = [*arguments(folder, tiny_target, tiny_corpus), *options, "evaluation.every_steps=2"]
    printed = run(command, ranks)
    assert metrics(folder) == metrics(plain)
    assert [line["step"] for line in lines_of(folder)] == [2, 4, 5]
    last = (folder / "draft_last" / "model.safetensors").read_bytes()
    assert last == (plain / "draft" / "model.safetensors").read_bytes()
    assert [line["held_out_documents"] for line in lines_of(folder)] == [4] * 3, printed
    HELD_OUT_LOSSES[placement] = [line["held_out_loss"] for line in lines_of(folder)]
    best = max(lines_of(folder), key=lambda line: line["acceptance_length"])
    assert f"the draft of step {best['step']}" in printed
    after = json.loads((folder / "summary.json").read_text())["after"]
    assert after["acceptance_length"] == best["acceptance_length"]
    if placement == "split" and "auto" in HELD_OUT_LOSSES:
        assert HELD_OUT_LOSSES["split"] == pytest.approx(HELD_OUT_LOSSES["auto"], rel=1e-4)


def test_a_run_ends_when_its_patience_does_and_stays_ended(tmp_path, tiny_target, tiny_corpus):
    """With a learning rate of nothing no draft is better than the first, and the held-out loss of the training data is that
    of training."""
    train = tmp_path / "train.jsonl"
    train.write_bytes(Path(tiny_corpus.held_out).read_bytes())
    corpus = TinyCorpus(str(train), tiny_corpus.held_out)
    command = [*arguments(tmp_path, tiny_target, corpus), "epochs=12", "evaluation.every_steps=2", "evaluation.patience=2"]
    command[command.index("data.max_tokens=40")] = "data.max_tokens=4096"
    command += ["evaluation.best_by=loss", "anneal_steps=3"]
    command += ["checkpoint.every_steps=3", "checkpoint.keep=1", "checkpoint.export=true"]
    frozen = json.loads(Path("ds_configs/zero3.json").read_text())
    frozen["optimizer"]["params"]["lr"] = 1e-12
    frozen["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-12, "warmup_num_steps": 2}}
    (tmp_path / "ds.json").write_text(json.dumps(frozen))
    command[command.index("ds_configs/zero3.json")] = str(tmp_path / "ds.json")
    printed = run(command)
    assert "ends early, after step 9: 2 evaluations brought no better draft" in printed
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4, 6, 8, 9]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_9"
    rates = [line["lr"] for line in metrics(tmp_path)]
    assert rates[5:] == pytest.approx([1e-12, 0.75e-12, 0.5e-12, 0.25e-12], rel=1e-6, abs=0)
    checkpoints = {name: tmp_path / "checkpoints" / name for name in ("step_2", "step_9")}
    assert {path.name for path in (tmp_path / "checkpoints").glob("step_*")} == set(checkpoints), "the best and the newest"
    for checkpoint, draft in zip(checkpoints.values(), ("draft", "draft_last"), strict=True):
        weights = checkpoint / "draft" / "model.safetensors"
        assert weights.read_bytes() == (tmp_path / draft / "model.safetensors").read_bytes()
        assert problem_of(checkpoint) is None
    for line in lines_of(tmp_path):
        trained = metrics(tmp_path)[line["step"] - 1]
        assert line["held_out_loss"] == pytest.approx(trained["loss"], rel=1e-4)
        assert line["held_out_accuracy_per_step"] == pytest.approx(trained["accuracy_per_step"], rel=1e-4)
        assert line["held_out_acceptance_length"] == pytest.approx(trained["simulated_acceptance_length"], rel=1e-4)
    again = launch([*command, "checkpoint.resume=true"])
    assert again.returncode == 0 and len(metrics(tmp_path)) == 9, again.stderr
    with (checkpoints["step_2"] / "draft" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    assert problem_of(checkpoints["step_2"]) == "the contents of draft/model.safetensors have changed"


def test_an_evaluation_that_a_run_did_not_live_to_see_is_made_up(tmp_path, tiny_target, tiny_corpus):
    """As after a kill between the checkpoint of a step and the end of its evaluation."""
    command = [*arguments(tmp_path, tiny_target, tiny_corpus), "max_steps=4", "checkpoint.every_steps=2"]
    run(command)
    assert not (tmp_path / "evaluations.jsonl").exists()
    printed = run([*command, "evaluation.every_steps=4", "checkpoint.resume=true"])
    assert [line["step"] for line in lines_of(tmp_path)] == [4] and "the draft of step 4" in printed
