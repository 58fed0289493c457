"""What is not finite is named once, a step late, and ends the run where it must."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.batch import DraftOutput, MicroBatch
from engine.hidden_states.finite import MAX_NAMED, NonFiniteError, without_faulty_documents
from engine.runtime.bad_step import BadStep
from engine.runtime.fault_watch import MAX_SKIPPED, FaultWatch, WatchSettings
from tests.runtime.test_metrics import FIRST
from tests.tasks import Task, make_documents

BAD = replace(FIRST, loss_S=torch.tensor([1.0, float("nan")]))
SETTINGS = WatchSettings(
    (0, 1, 3), lambda index: f"train.jsonl:{index}", stops=False, skips=False, folder=Path("/proc/cannot_be_written")
)


def micro_of(document_ids: tuple[int, ...], bad: tuple[int, ...]) -> MicroBatch:
    """One document for each id; those in `bad` overflow in the second auxiliary layer and in the last hidden state."""
    micro = Task().micro(make_documents((7,) * len(document_ids), "reply"))
    micro = replace(micro, batch=replace(micro.batch, document_ids=document_ids))
    for index, document in enumerate(document_ids):
        if document in bad:
            micro.target.aux_TA[7 * index + 6, 50] = float("inf")
            micro.target.last_hidden_ND[(micro.target.slots_N // 7 == index).nonzero()[0], 3] = float("nan")
    return without_faulty_documents(micro)


def watch(settings: WatchSettings = SETTINGS) -> tuple[FaultWatch, list[str]]:
    warnings: list[str] = []
    return FaultWatch(settings, warnings.append), warnings


def test_a_document_is_named_once_with_its_first_bad_place():
    watched, warnings = watch()
    for step in (1, 2):
        watched.add(step, FIRST, micro_of((4, 9, 2), bad=(9,)))
    watched.read(until_step=1)
    assert len(warnings) == 1 and watched.left_out.keys() == {9}
    assert "step 1" in warnings[0] and "train.jsonl:9" in warnings[0] and "the output of layer 1 " in warnings[0]
    watched.read(until_step=2)
    assert len(warnings) == 1


def test_a_run_that_shall_stop_does_and_names_the_document():
    watched, _ = watch(replace(SETTINGS, stops=True))
    watched.add(3, FIRST, micro_of((4, 9), bad=(4,)))
    watched.read(until_step=2)
    with pytest.raises(NonFiniteError, match=r"step 3: train.jsonl:4: .*target.non_finite=leave_out"):
        watched.read(until_step=3)


@pytest.mark.parametrize("output", [BAD, replace(FIRST, loss_S=torch.tensor([float("inf"), 0.0]))])
def test_a_loss_of_the_draft_that_is_not_finite_ends_the_run_by_the_number_of_its_step(output: DraftOutput):
    watched, _ = watch()
    watched.add(7, FIRST, micro_of((1,), bad=()))
    watched.add(8, output, micro_of((2,), bad=()))
    watched.read(until_step=7)
    with pytest.raises(NonFiniteError, match="step 8: the draft's loss is not finite"):
        watched.read(until_step=8)


def test_a_bad_step_is_listed_with_its_documents_and_may_be_skipped(tmp_path):
    watched, warnings = watch(replace(SETTINGS, skips=True, folder=tmp_path / "bad_steps", rank=3))
    watched.add(7, FIRST, micro_of((1, 5), bad=()))
    watched.add(8, FIRST, micro_of((2,), bad=()))
    watched.add(8, BAD, micro_of((9, 4), bad=()))
    watched.read(until_step=8)
    assert len(warnings) == 1 and "rank 3: step 8" in warnings[0] and "its gradient is dropped" in warnings[0]
    listed = BadStep.read(tmp_path / "bad_steps" / "step_8_rank_3.json")
    assert (listed.step, listed.rank) == (8, 3)
    for _ in range(200):
        watched.add(9, FIRST, micro_of((1,), bad=()))
    assert listed.documents == [(index, f"train.jsonl:{index}") for index in (2, 9, 4)]
    watched.count_skipped(8, 1)
    resumed = FaultWatch(SETTINGS, warnings.append, num_skipped=3)
    resumed.count_skipped(9, 3)
    assert len(warnings) == 1, "a resumed run has the skipped steps of the earlier one"
    assert BadStep.read(tmp_path / "bad_steps" / "step_8_rank_3.json").reason == "the gradient is not finite"
    (tmp_path / "bad_steps" / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the list of a bad step"):
        BadStep.read(tmp_path / "bad_steps" / "other.json")


def test_a_target_that_is_broken_for_most_documents_ends_the_run():
    watched, warnings = watch()
    for step in range(8):
        ids = tuple(range(4 * step, 4 * step + 4))
        watched.add(step, FIRST, micro_of(ids, bad=ids[:2]))
    watched.read(until_step=7)
    watched.add(8, FIRST, micro_of((40, 41), bad=(40, 41)))
    with pytest.raises(NonFiniteError, match=r"18 of 34 documents so far .*the target itself is broken"):
        watched.read(until_step=8)


def test_not_every_document_is_named_on_the_screen():
    watched, warnings = watch()
    good = tuple(range(1000, 1040))
    watched.add(1, FIRST, micro_of(good, bad=()))
    bad = tuple(range(MAX_NAMED + 5))
    watched.add(1, FIRST, micro_of(bad, bad))
    watched.read(until_step=1)
    assert len(warnings) == MAX_NAMED + 1 and "summary.json" in warnings[-1]
    assert len(watched.left_out) == MAX_NAMED + 5


def test_steps_that_deepspeed_leaves_out_are_named_and_too_many_in_a_row_end_the_run():
    watched, warnings = watch()
    watched.count_skipped(1, 0)
    watched.count_skipped(2, 1)
    watched.count_skipped(3, 1)
    assert len(warnings) == 1 and "step 2: the gradient is not finite" in warnings[0]
    with pytest.raises(NonFiniteError, match=f"as in the {MAX_SKIPPED - 1} steps before it"):
        for step in range(4, 200):
            watched.count_skipped(step, step - 2)


def test_a_spike_of_the_gradient_is_named_once_with_its_documents(tmp_path):
    watched, warnings = watch(replace(SETTINGS, folder=tmp_path))
    norms = [1.0 + 0.1 * (step % 5) for step in range(30)] + [40.0, 45.0, 1.2, float("nan"), 50.0]
    for step in range(len(norms)):
        watched.add(step, FIRST, micro_of((step,), bad=()))
        if step:
            watched.judge_grad_norm(step - 1, norms[step - 1])
    assert len(warnings) == 1 and "step 30: the norm of the gradient is 40, 33 times the median" in warnings[0]
    (listed,) = tmp_path.glob("*.json")
    assert BadStep.read(listed).documents == [(30, "train.jsonl:30")]
    watched.judge_grad_norm(34, norms[34])
    assert len(warnings) == 2, "a new spike after a normal step"
    early, warnings = watch()
    for step, norm in enumerate((1.0, 1.0, 100.0)):
        early.judge_grad_norm(step, norm)
    assert not warnings, "too few steps to judge"


def test_steps_skipped_in_search_of_a_loss_scale_are_no_faults_until_they_do_not_end(tmp_path):
    watched, warnings = watch(replace(SETTINGS, folder=tmp_path, searches_scale=True))
    for step in range(1, MAX_SKIPPED):
        watched.count_skipped(step, step)
    assert not warnings and not list(tmp_path.iterdir())
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        watched.count_skipped(MAX_SKIPPED, MAX_SKIPPED)
