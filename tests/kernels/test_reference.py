"""The specifications of attention, with what must equal it on a CPU, and of fp8 weights, against what is written out."""

import pytest
import torch

from engine.kernels import AttentionRows, blocked_attention, reference
from engine.kernels.reference import dequantised, fp8_activations, fp8_linear, quantised_rows, rounded_rows
from tests.kernels.attention_cases import ANCESTORS, HEADS, LENGTHS, QUERIES, make_case, with_gradients, written_out
from tests.pairwise import pairwise


@pytest.fixture(params=["reference", "blocked", "blocks of 3 rows"])
def ancestor_attention(request, monkeypatch):
    if request.param == "blocks of 3 rows":
        monkeypatch.setattr(blocked_attention, "ROWS_PER_BLOCK", 3)
    return reference.ancestor_attention if request.param == "reference" else blocked_attention.ancestor_attention


@pairwise(lengths=LENGTHS, heads=HEADS, queries=QUERIES, ancestors=ANCESTORS)
def test_attention_is_one_masked_softmax_over_prefix_and_ancestors(ancestor_attention, lengths, heads, queries, ancestors):
    lengths = LENGTHS[lengths]
    case = make_case(lengths, HEADS[heads], QUERIES[queries](sum(lengths)), ANCESTORS[ancestors])
    output, lse, grads = with_gradients(ancestor_attention, case)
    expected, expected_lse, expected_grads = with_gradients(written_out, case, torch.float64)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_leaving_out_rows_leaves_the_others_as_they_were(ancestor_attention):
    every = make_case((4, 9, 1), (4, 2), torch.arange(14), (3, False))
    kept_Q = torch.tensor([0, 5, 6, 12, 13])
    some = AttentionRows(kept_Q, every.rows.cu_seqlens, tuple(ancestor_Q[kept_Q] for ancestor_Q in every.rows.ancestors))
    (query, *keys, rows), _ = every.arguments()
    output, lse = ancestor_attention(query, *keys, rows)
    some_output, some_lse = ancestor_attention(query[kept_Q], *keys, some)
    torch.testing.assert_close(some_output, output[kept_Q])
    torch.testing.assert_close(some_lse, lse[kept_Q])


def test_scores_of_a_thousand_stay_finite(ancestor_attention):
    case = make_case((5, 3), (2, 1), torch.arange(8), (2, False), scale=30.0)
    output, lse, grads = with_gradients(ancestor_attention, case)
    assert all(tensor.isfinite().all() for tensor in (output, lse, *grads))


def test_bf16_attention_errs_no_more_than_its_rounding(ancestor_attention):
    case = make_case((7, 6), (4, 2), torch.arange(13), (3, False))
    arguments, _ = case.arguments(torch.bfloat16)
    ours, _ = ancestor_attention(*arguments)
    *tensors, rows = arguments
    wide = [[t.double() for t in x] if isinstance(x, list) else x.double() for x in tensors]
    expected, _ = written_out(*wide, rows)
    assert ours.dtype == torch.bfloat16
    # all but the result is in fp32
    assert (ours.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_a_value_is_multiplied_by_the_scale_of_its_block():
    codes = torch.randn(2, 5, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, 2)
    written = [[[codes[x, n, k].float() * scale[x, n // 2, k // 4] for k in range(7)] for n in range(5)] for x in range(2)]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantised(codes, scale, (1, 2, 4), dtype), torch.tensor(written).to(dtype))


def test_rows_meet_the_weight_of_their_own_expert():
    codes = torch.randn(3, 5, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3, 2)
    rows = torch.randn(6, 7)
    weights = dequantised(codes, scale, (1, 2, 4), torch.float32)
    expected = [rows[row] @ weights[expert].T for row, expert in enumerate((0, 0, 2, 2, 2, 2))]
    torch.testing.assert_close(fp8_linear(rows, codes, scale, (2, 4), torch.tensor([2, 2, 6])), torch.stack(expected))


def test_a_group_of_a_rows_inputs_has_the_scale_of_its_largest():
    rows = torch.randn(5, 7)
    rows[3] = 0
    codes, scale = quantised_rows(rows, 4)
    for row in range(5):
        for group, inputs in enumerate((slice(0, 4), slice(4, 7))):
            expected = max(rows[row, inputs].abs().max().item(), 1e-10) / 448
            assert scale[row, group].item() == pytest.approx(expected, rel=1e-6)
            written = (rows[row, inputs] / scale[row, group]).to(torch.float8_e4m3fn)
            assert torch.equal(codes[row, inputs].float(), written.float())
    assert torch.equal(rounded_rows(rows, 4), dequantised(codes, scale, (1, 4), torch.float32))


def test_both_operands_are_multiplied_as_their_codes_mean():
    codes = torch.randn(3, 5, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3, 2)
    rows = torch.randn(6, 7)
    ends = torch.tensor([2, 2, 6])
    expected = fp8_linear(rounded_rows(rows, 3), codes, scale, (2, 4), ends)
    assert torch.equal(fp8_activations(rows, codes, scale, (2, 4), ends, group=3), expected)
    rows = rows.bfloat16()  # which round to other codes than before
    half, expected = (fp8_activations(of, codes, scale, (2, 4), ends, group=3) for of in (rows, rows.float()))
    assert half.dtype == torch.bfloat16 and (half - expected).norm() <= 0.02 * expected.norm()
