"""Every row sees exactly the context before its anchor and the rows of its block that its layer allows."""

from dataclasses import replace

import pytest
import torch

from engine.batch import documents_of
from engine.models.block_drafter.anchors import AnchorRule
from engine.models.block_drafter.block_rows import BlockPlan, BlockShape, plan_blocks, prediction_slots
from tests.block_drafts import make_batch

LENGTHS = (19, 5, 33, 8)
SHAPES = [
    BlockShape(5, 0, (None, None), is_causal=False),
    BlockShape(5, 1, (None, None), is_causal=True),
    BlockShape(6, 0, (7, None), is_causal=False),
    BlockShape(6, 0, (7, 3), is_causal=False),
    BlockShape(6, 1, (4, 9), is_causal=True),
    BlockShape(6, 1, (4, 4), is_causal=True, window_from_anchor=True),
    BlockShape(6, 1, (4, 4), is_causal=True, window_from_anchor=True, window_in_block=False),
    BlockShape(6, 0, (4, None), is_causal=None),
]


def seen_keys(plan: BlockPlan, shape: BlockShape, layer: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which packed tokens and which rows each row sees according to the plan, bool [P, T] and [P, P]."""
    rows = plan.layers[layer]
    context_C = torch.arange(num_tokens) if plan.context_C is None else plan.context_C
    sees_PT = torch.zeros(plan.num_rows, num_tokens, dtype=torch.bool)
    sees_PP = torch.zeros(plan.num_rows, plan.num_rows, dtype=torch.bool)
    for row in range(plan.num_rows):
        sees_PT[row, context_C[rows.context_begin_Q[row] : rows.context_end_Q[row]]] = True
        sees_PP[row, rows.own_begin_Q[row] : rows.own_end_Q[row]] = True
    return sees_PT, sees_PP


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_see_what_the_definition_says(shape, compaction):
    batch = make_batch(LENGTHS)
    document_T = documents_of(batch.cu_seqlens, batch.num_tokens)
    allowed_ST = AnchorRule(shape.block_size - 1 + shape.shift, share=0.5).rows(batch)
    plan = plan_blocks(batch, allowed_ST, shape, compaction)
    for layer, window in enumerate(shape.windows):
        sees_PT, sees_PP = seen_keys(plan, shape, layer, batch.num_tokens)
        reach = batch.num_tokens + 99 if window is None else window
        is_causal = window is not None if shape.is_causal is None else shape.is_causal
        token_T = torch.arange(batch.num_tokens)
        for row in range(plan.num_rows):
            anchor = int(plan.anchor_N[plan.block_P[row]])
            offset = int(plan.offset_P[row])
            from_row = 0 if shape.window_from_anchor else offset + 1
            is_same_T = document_T == document_T[anchor]
            expected_T = is_same_T & (token_T < anchor) & (anchor + from_row - token_T <= reach)
            assert torch.equal(sees_PT[row], expected_T)
            distance_P = offset - plan.offset_P
            expected_P = plan.block_P == plan.block_P[row]
            if is_causal:
                expected_P = expected_P & (distance_P >= 0)
                if shape.window_in_block:
                    expected_P = expected_P & (distance_P < reach)
            assert torch.equal(sees_PP[row], expected_P)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rows_with_loss_are_the_allowed_ones(shape):
    batch = make_batch(LENGTHS)
    allowed_ST = AnchorRule(shape.block_size - 1 + shape.shift, share=0.5).rows(batch)
    for compaction in (True, False):
        plan = plan_blocks(batch, allowed_ST, shape, compaction)
        learned_ST = torch.zeros_like(allowed_ST)
        anchor_R = plan.anchor_N[plan.block_P[plan.loss_row_R]]
        learned_ST[plan.prediction_R, anchor_R - 1] = True
        assert torch.equal(learned_ST, allowed_ST)
        assert torch.equal(plan.slot_R, anchor_R + plan.prediction_R)
        position_R = plan.position_P[plan.loss_row_R]
        assert torch.equal(position_R, batch.position_T[anchor_R] + plan.prediction_R + 1 - shape.shift)
    assert torch.equal(prediction_slots(allowed_ST), plan.slot_R.unique())


def test_causal_blocks_end_at_their_last_row_with_loss():
    batch = make_batch(LENGTHS)
    shape = BlockShape(6, 1, (None,), is_causal=True)
    allowed_ST = AnchorRule(6).rows(batch)
    plan = plan_blocks(batch, allowed_ST, shape)
    assert plan.num_rows == len(plan.loss_row_R) < len(plan.anchor_N) * 6
    for longer in (replace(shape, is_causal=False), replace(shape, windows=(4, None), is_causal=None)):
        assert plan_blocks(batch, allowed_ST, longer).num_rows == len(plan.anchor_N) * 6
    short = replace(shape, windows=(4, 4), is_causal=None)
    assert plan_blocks(batch, allowed_ST, short).num_rows == plan.num_rows


def test_context_that_no_block_sees_is_left_out():
    batch = make_batch(LENGTHS)
    allowed_ST = torch.zeros(4, batch.num_tokens, dtype=torch.bool)
    allowed_ST[0, 30] = True
    start = LENGTHS[0] + LENGTHS[1]
    full = plan_blocks(batch, allowed_ST, BlockShape(5, 0, (None, 4), is_causal=False))
    assert full.context_C.tolist() == list(range(start, 31))
    narrow = plan_blocks(batch, allowed_ST, BlockShape(5, 0, (3, 4), is_causal=False))
    assert narrow.context_C.tolist() == [28, 29, 30]


@pytest.mark.parametrize("from_anchor", [False, True])
@pytest.mark.parametrize("windows", [(1, 1), (2, 1), (7, 4)])
def test_every_context_token_that_is_kept_is_seen(windows, from_anchor):
    batch = make_batch(LENGTHS)
    shape = BlockShape(6, 0, windows, is_causal=False, window_from_anchor=from_anchor)
    plan = plan_blocks(batch, AnchorRule(5, share=0.1).rows(batch), shape)
    seen_T = torch.stack([seen_keys(plan, shape, layer, batch.num_tokens)[0].any(0) for layer in (0, 1)]).any(0)
    assert torch.equal(plan.context_C, seen_T.nonzero().flatten())
    assert (len(plan.context_C) == 0) == (windows == (1, 1) and not from_anchor)


def test_a_batch_without_blocks_has_an_empty_plan():
    batch = make_batch(LENGTHS)
    plan = plan_blocks(batch, torch.zeros(4, batch.num_tokens, dtype=torch.bool), SHAPES[2])
    assert plan.num_rows == 0
    assert len(plan.loss_row_R) == 0
