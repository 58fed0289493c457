"""The Markov head's bias is what its formulas say, in training and while drafting."""

import pytest
import torch

from engine.models.block_drafter.block_rows import plan_blocks
from engine.models.dspark.markov_head import GATED, RNN, VANILLA, ConfidenceHead, MarkovHead
from tests.block_drafts import HIDDEN, VOCAB, make_batch, make_method_of

RANK = 6


def expected_bias(head: MarkovHead, hidden_SD: torch.Tensor, previous_S: list[int]) -> torch.Tensor:
    """The bias of the rows of one block, written out row by row, [S, V]."""
    state = torch.zeros(RANK, dtype=torch.float64)
    rows = []
    for hidden, previous in zip(hidden_SD, previous_S, strict=True):
        embed = head.markov_w1.weight[previous]
        factor = embed
        if head.kind == GATED:
            gate = head.gate_proj.weight @ torch.cat((hidden, embed)) + head.gate_proj.bias
            factor = embed / (1 + torch.exp(-gate))
        if head.kind == RNN:
            joint = head.joint_proj.weight @ torch.cat((state, embed, hidden)) + head.joint_proj.bias
            keep = 1 / (1 + torch.exp(-joint[:RANK]))
            state = keep * state + (1 - keep) * torch.tanh(joint[RANK : 2 * RANK])
            factor = torch.tanh(joint[2 * RANK :])
        rows.append(head.markov_w2.weight @ factor)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [VANILLA, GATED, RNN])
def test_the_bias_of_all_blocks_is_that_of_each_block(kind):
    torch.manual_seed(0)
    head = MarkovHead(kind, VOCAB, HIDDEN, RANK).double()
    method = make_method_of("dspark")
    batch = make_batch((17, 23))
    plan = plan_blocks(batch, method.allowed_rows(batch), method.shape)
    hidden_RD = torch.randn(len(plan.loss_row_R), HIDDEN, dtype=torch.float64)
    previous_R = batch.input_ids_T[plan.slot_R]
    bias = head.bias(plan, hidden_RD, previous_R)
    found_RV = bias.factor_Rr @ bias.weight_Vr.T
    block_R = plan.block_P[plan.loss_row_R]
    for block in range(len(plan.anchor_N)):
        own_R = block_R == block
        torch.testing.assert_close(found_RV[own_R], expected_bias(head, hidden_RD[own_R], previous_R[own_R].tolist()))


def test_the_confidence_head_may_leave_the_embedding_out():
    head = ConfidenceHead(HIDDEN, 0)
    hidden_QD = torch.randn(3, HIDDEN)
    expected_Q = hidden_QD @ head.proj.weight[0] + head.proj.bias
    torch.testing.assert_close(head(hidden_QD, torch.randn(3, RANK)), expected_Q)
