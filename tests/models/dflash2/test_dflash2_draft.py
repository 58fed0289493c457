"""The rows of the first layer that have one input are projected once, with the result and the gradients of all rows."""

import pytest
import torch

from engine.models.block_drafter.backbone import spread
from engine.models.block_drafter.block_rows import plan_blocks
from tests.block_drafts import HIDDEN, NUM_AUX, gradients, make_batch, make_draft, make_method_of


def results(taps: int, lengths: tuple[int, ...], causal: bool, projects_once: bool, size: int = 5) -> list[torch.Tensor]:
    """The inputs of the first layer's attention, and all gradients of a weighted sum of them."""
    method = make_method_of("dflash2", conv_taps=taps, causal=causal, size=size)
    draft = make_draft(method).double()
    batch = make_batch(lengths)
    plan = plan_blocks(batch, method.allowed_rows(batch), method.shape)
    generator = torch.Generator().manual_seed(1)
    embed_ND = torch.randn(len(plan.anchor_N), HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
    layer = draft.decoder_layers[0]
    if projects_once:
        inputs = draft.first_inputs(layer, embed_ND, plan)
    else:
        state_MD = torch.cat((embed_ND, draft.mask_embed_D[None]))
        inputs = draft.inputs(layer, spread(state_MD, plan), plan)
    found = [inputs.state_QD, inputs.query_QHE, inputs.key_PGE, inputs.value_PGE, inputs.kernel]
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in found)
    total.backward()
    gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    return [*found, embed_ND.grad, *gradients]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("taps", "size"), [(1, 5), (2, 5), (3, 5), (3, 2)])
def test_projecting_once_gives_the_inputs_of_all_rows(taps, size, causal):
    lengths = (17, 23, 9)
    once_and_each = [results(taps, lengths, causal, projects_once, size) for projects_once in (True, False)]
    for once, each in zip(*once_and_each, strict=True):
        torch.testing.assert_close(once, each, rtol=1e-12, atol=1e-12)


def test_a_micro_batch_without_blocks_has_no_rows():
    state_PD, *others = results(2, (1, 1), False, True)
    each_PD, *of_each = results(2, (1, 1), False, False)
    assert state_PD.shape == each_PD.shape == (0, HIDDEN)
    assert len(others) == len(of_each), "the same weights have gradients, which ZeRO sums in one order"
    assert not any(found.any() for found in others)


def test_few_rows_are_projected(monkeypatch):
    """Two rows of each block and one for all others, instead of every row."""
    rows = []
    method = make_method_of("dflash2", size=8)
    draft = make_draft(method)
    batch = make_batch((60,))
    plan = plan_blocks(batch, method.allowed_rows(batch), method.shape)
    query = type(draft.decoder_layers[0].self_attn.q_proj)
    projected = query.forward

    def counted(self, x_QK):
        rows.append(len(x_QK))
        return projected(self, x_QK)

    monkeypatch.setattr(query, "forward", counted)
    draft.first_inputs(draft.decoder_layers[0], torch.zeros(len(plan.anchor_N), HIDDEN), plan)
    assert rows == [2 * len(plan.anchor_N) + 1] * 3 and rows[0] < plan.num_rows / 3


@pytest.mark.parametrize(("taps", "num_layers"), [(1, 2), (2, 1), (3, 2)])
def test_the_last_layer_leaves_out_the_rows_behind_the_last_one_with_loss(taps, num_layers, monkeypatch):
    method = make_method_of("dflash2", conv_taps=taps)
    draft = make_draft(method).double()
    draft.layers = draft.layers[:num_layers]
    batch = make_batch((17, 23, 9))
    plan = plan_blocks(batch, method.allowed_rows(batch), method.shape)
    learns_P = torch.zeros(plan.num_rows, dtype=torch.bool)
    learns_P[plan.loss_row_R] = True
    leading = []
    for row in range(plan.num_rows):
        is_later_P = (plan.block_P == plan.block_P[row]) & (plan.offset_P >= plan.offset_P[row])
        if (is_later_P & learns_P).any():
            leading.append(row)
    assert plan.leading_row_Q.tolist() == leading
    assert len(plan.loss_row_R) < len(leading) < plan.num_rows
    aux_TA = torch.randn(batch.num_tokens, NUM_AUX * HIDDEN, dtype=torch.float64)
    embed_ND = torch.randn(len(plan.anchor_N), HIDDEN, dtype=torch.float64)
    rows: list[int] = []
    mlp = type(draft.decoder_layers[0].mlp)
    mlp_forward = mlp.forward

    def counted(self, x_QD):
        rows.append(len(x_QD))
        return mlp_forward(self, x_QD)

    monkeypatch.setattr(mlp, "forward", counted)
    hidden_RD = draft.hidden_rows(aux_TA, embed_ND, plan)
    assert rows == [plan.num_rows] * (num_layers - 1) + [len(leading)]
    monkeypatch.setattr(type(draft), "last_layer_rows", lambda self, plan: torch.arange(plan.num_rows))
    expected_RD = draft.hidden_rows(aux_TA, embed_ND, plan)
    torch.testing.assert_close(hidden_RD, expected_RD, rtol=1e-12, atol=1e-12)
    grad_RD = torch.randn_like(hidden_RD)
    found, expected = (gradients(draft, (rows_RD * grad_RD).sum()) for rows_RD in (hidden_RD, expected_RD))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10)
