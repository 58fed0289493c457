"""Which rows run, against docs/ttt.md, written out row by row (see slow_ttt.py)."""

import itertools

import pytest
import torch

from engine.config.sections import TttSection
from engine.kernels.row_index import ROW_GRANULE
from engine.models.eagle3.row_plan import plan_rows
from engine.models.training_rows import allowed_rows, loss_rows, row_slots
from tests.tasks import ALIGNMENTS, MASKS, STEPS, Task, make_documents


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_rows_that_run_are_those_that_a_loss_depends_on_and_fewer_than_a_granule_more(mask, steps, alignment):
    task = Task(TttSection(steps=steps, mask_alignment=alignment))
    micro = task.micro(make_documents((90, 1, 150), mask))
    allowed_ST = allowed_rows(micro.batch, task.ttt)
    carries_loss_ST = loss_rows(allowed_ST, micro.target, task.vocab_map)
    slot_ST = row_slots(micro.target.slots_N, allowed_ST)
    plan = plan_rows(carries_loss_ST, slot_ST, micro.batch.cu_seqlens, slots_per_chunk=50, compaction=True)
    position_Q = torch.arange(micro.batch.num_tokens)
    read = []
    for step in range(steps):
        position_Q = position_Q if plan.kept[step] is None else position_Q[plan.kept[step]]
        assert (position_Q.diff() > 0).all()
        needed = {t for t in range(micro.batch.num_tokens) if carries_loss_ST[step:, t].any()}
        assert needed <= set(position_Q.tolist()) and len(position_Q) < len(needed) + ROW_GRANULE["cpu"]
        if plan.is_dense[step]:
            runs = [
                position_Q[(position_Q >= start) & (position_Q < end)].diff() for start, end in ((0, 90), (90, 91), (91, 241))
            ]
            assert all((run == 1).all() for run in runs)
        own = position_Q[plan.loss_rows[step]]
        assert own.tolist() == carries_loss_ST[step].nonzero().flatten().tolist()
        read += [(step, int(slot_ST[step, t])) for t in own]
    assert [slot for _, slot in read] == plan.loss.slot_R.tolist()
    for step, bounds in enumerate(plan.loss.bounds):
        for chunk, (start, end) in enumerate(itertools.pairwise(bounds)):
            assert all(s == step and slot // 50 == chunk for s, slot in read[start:end])
    assert plan.loss.bounds[-1][-1] == len(read)


@pytest.mark.parametrize("tail", [0, 3, 40])
@pytest.mark.parametrize("ends_alive", [(5, 33, 70), (30, 30, 30), (0, 1, 64)])
def test_rows_that_complete_a_granule_keep_the_rows_of_each_document_together(ends_alive, tail):
    """Documents whose loss is one run, before `tail` tokens without loss, and shorter at each step."""
    lengths = (100, 61, 200)
    steps = 4
    carries_loss_ST = torch.zeros(steps, sum(lengths), dtype=torch.bool)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for step in range(steps):
        for start, end, length in zip(starts, starts[1:], ends_alive, strict=False):
            last = max(int(start), int(end) - tail - step)
            carries_loss_ST[step, max(int(start), last - length) : last] = True
    slot_ST = torch.zeros_like(carries_loss_ST, dtype=torch.long)
    plan = plan_rows(carries_loss_ST, slot_ST, starts.int(), slots_per_chunk=500, compaction=True)
    assert all(plan.is_dense)
    position_Q = torch.arange(sum(lengths))
    for step in range(steps):
        position_Q = position_Q if plan.kept[step] is None else position_Q[plan.kept[step]]
        assert len(position_Q) % ROW_GRANULE["cpu"] == 0
        needed = carries_loss_ST[step:].any(0).nonzero().flatten()
        assert set(needed.tolist()) <= set(position_Q.tolist())
        for start, end in itertools.pairwise(starts.tolist()):
            own_Q = position_Q[(position_Q >= start) & (position_Q < end)]
            assert (own_Q.diff() == 1).all()
