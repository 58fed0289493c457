"""Which rows exist and carry loss, against docs/ttt.md, written out row by row (see slow_ttt.py)."""

import pytest
import torch

from engine.config.sections import TttSection
from engine.models.training_rows import allowed_rows, loss_rows, row_slots, slots_of
from tests.slow_ttt import slow_allowed
from tests.tasks import ALIGNMENTS, LENGTHS, MASKS, STEPS, Task, make_batch, make_documents


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("mask", MASKS)
def test_rows_are_those_of_the_literal_double_loop(mask, alignment, steps):
    task = Task(TttSection(steps=steps, mask_alignment=alignment))
    for seed, lengths in enumerate(LENGTHS):
        documents = make_documents(lengths, mask, seed)
        batch = make_batch(documents)
        micro = task.micro(documents)
        expected_ST = slow_allowed(batch, task.ttt)
        allowed_ST = allowed_rows(batch, task.ttt)
        assert torch.equal(allowed_ST, expected_ST)
        learned = sorted({t + 1 + i for i, t in expected_ST.nonzero().tolist()})
        assert slots_of(allowed_ST).tolist() == learned
        slot_ST = row_slots(micro.target.slots_N, allowed_ST)
        for i, t in expected_ST.nonzero().tolist():
            assert micro.target.slots_N[slot_ST[i, t]] == t + 1 + i
        in_draft = set(task.vocab_map.target_ids_U.tolist())
        best = dict(zip(learned, micro.target.argmax_N.tolist(), strict=True))
        expected = [[bool(row) and best[t + 1 + i] in in_draft for t, row in enumerate(s)] for i, s in enumerate(expected_ST)]
        assert loss_rows(allowed_ST, micro.target, task.vocab_map).tolist() == expected


def test_the_rows_tried_above_differ_in_every_way_that_matters():
    batch = make_batch(make_documents((23, 9), "two replies"))
    inference, specforge = (allowed_rows(batch, TttSection(steps=3, mask_alignment=name)) for name in ALIGNMENTS)
    assert inference.any() and specforge.any() and not torch.equal(inference, specforge)
    task = Task()
    micro = task.micro(make_documents((23,), "all"))
    allowed_ST = allowed_rows(micro.batch, task.ttt)
    assert 0 < loss_rows(allowed_ST, micro.target, task.vocab_map).sum() < allowed_ST.sum()
