"""What is done with a quantised weight is done with what it means, and what only moves values leaves it quantised."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels import reference
from engine.weights import quantised_weight
from engine.weights.quantised_checkpoint import FP4, INT4
from engine.weights.quantised_weight import QuantisedWeight

SHAPE = (3, 10, 24)  # experts, outputs, inputs


def make_weight(kind: str) -> QuantisedWeight:
    """Blocks that nothing is a multiple of; or codes of 4 bits as published, those of MXFP4 turned."""
    g = torch.Generator().manual_seed(0)
    experts, outputs, inputs = SHAPE
    if kind == "fp8":
        codes = torch.randn(SHAPE, generator=g).to(torch.float8_e4m3fn)
        return QuantisedWeight(codes, torch.rand(experts, 3, 5, generator=g), (1, 4, 5))
    if kind == "int4":
        codes = torch.randint(0, 256, (experts, outputs, inputs // 2), generator=g, dtype=torch.uint8)
        scale = torch.rand(experts, outputs, 3, generator=g).bfloat16()
        return QuantisedWeight(codes, scale, (1, 1, 8), meanings=INT4, packing=(1, 1, 2))
    codes = torch.randint(0, 256, (experts, inputs, outputs // 2), generator=g, dtype=torch.uint8)
    weight = QuantisedWeight(codes, torch.rand(experts, inputs, 2, generator=g), (1, 1, 8), meanings=FP4, packing=(1, 1, 2))
    return weight.transpose(1, 2)


@pytest.fixture(params=["fp8", "int4", "mxfp4"])
def weight(request) -> QuantisedWeight:
    return make_weight(request.param)


MOVES = {
    "rows": lambda w: w[:, 2:8],
    "columns": lambda w: w.narrow(2, 6, 16),
    "experts": lambda w: w[1:3],
    "segments": lambda w: torch.cat([w[:, 2:4], w[:, 6:10]], 1),
    "columns of all": lambda w: torch.cat([w.narrow(2, 0, 6), w.narrow(2, 14, 10), w], 2),
    "an expert": lambda w: w[torch.tensor(1)],
    "a stack": lambda w: torch.stack([w[2], w[0]]),
    "gate and up": lambda w: torch.cat([w[:1], w[1:2]], dim=1),
    "transpose": lambda w: w.mT,
    "part of the turned": lambda w: w.transpose(1, 2)[:, 4:14],
    "twice": lambda w: w[:, 2:][:, 4:],
    "detached": lambda w: w.detach(),
    "unsqueezed": lambda w: w[0].unsqueeze(0),
    "in half": lambda w: w.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("move", MOVES)
def test_what_only_moves_values_keeps_them_quantised(move, weight):
    moved = MOVES[move](weight)
    expected = MOVES[move](weight.dequantised())
    assert isinstance(moved, QuantisedWeight) and (moved.shape, moved.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(moved.dequantised(), expected) and moved.row_group is None
    weight.row_group = 2
    assert MOVES[move](weight).row_group == 2


CHANGES = {
    "sum": lambda w: w + 1,
    "every other row": lambda w: w[:, ::2],
    "permuted": lambda w: w.permute(2, 0, 1),
    "chosen": lambda w: w[torch.tensor([2, 0])],
    "zeros": torch.zeros_like,
    "with others": lambda w: torch.cat([w, torch.ones(3, 1, 24)], 1),
    "one row": lambda w: w[0][3],
    "product": lambda w: torch.ones(2, 24) @ w[1].t(),
    "batched": lambda w: torch.bmm(torch.ones(3, 2, 10), w),
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_else_gets_what_it_means(change, weight):
    changed = CHANGES[change](weight)
    assert type(changed) is torch.Tensor
    torch.testing.assert_close(changed, CHANGES[change](weight.dequantised()))  # products add in an order of their own


def test_what_would_split_a_byte_is_dequantised():
    weight = make_weight("int4")
    odd = weight[..., 3:8]
    assert type(odd) is torch.Tensor and torch.equal(odd, weight.dequantised()[..., 3:8])


def test_experts_are_gathered_one_by_one(weight):
    room = weight.new_empty(2, *weight.shape[1:])
    room[0], room[1] = weight[2], weight[1]
    assert isinstance(room, QuantisedWeight) and torch.equal(room.dequantised(), weight.dequantised()[[2, 1]])
    dense = torch.zeros(2, *weight.shape[1:])
    dense[1] = weight[0]
    assert torch.equal(dense[1], weight.dequantised()[0])


def test_nothing_writes_to_it(weight):
    with pytest.raises(AssertionError, match="would write"):
        weight.zero_()


def test_it_takes_the_bytes_of_codes_and_scales():
    codes = torch.zeros(256, 512).to(torch.float8_e4m3fn)
    scale = torch.ones(2, 4)
    weight = QuantisedWeight(codes, scale, (128, 128), torch.bfloat16)
    assert weight.nbytes == 256 * 512 + 8 * 4
    assert weight[:128].nbytes == 128 * 512 + 4 * 4 and weight[:, 64:].scale.shape == (2, 7)


@pytest.fixture(params=["plain", "triton"])
def products(request, monkeypatch):
    if request.param == "triton":
        fused = pytest.importorskip("engine.kernels.fp8_linear", reason="Triton is not installed")
        monkeypatch.setattr(quantised_weight, "choose_fp8_linear", lambda device: fused.fp8_linear)


@pytest.fixture(params=["plain", "triton"])
def products_of_fp8(request, monkeypatch):
    if request.param == "triton":
        fused = pytest.importorskip("engine.kernels.fp8_activations", reason="Triton is not installed")
        monkeypatch.setattr(quantised_weight, "choose_fp8_activations", lambda device: fused.fp8_activations)


@torch.inference_mode()
def test_rows_are_quantised_before_they_are_multiplied(products_of_fp8):
    weight = make_weight("fp8")
    rows = torch.randn(2, 3, 24)
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    weight.row_group = 16
    rounded_MK = reference.rounded_rows(rows.flatten(0, 1), 16)
    dense = weight.dequantised()
    linear = nn.Linear(24, 10)
    expected = F.linear(rounded_MK.view(rows.shape), dense[1], linear.bias)
    linear.weight = nn.Parameter(weight[1], requires_grad=False)
    torch.testing.assert_close(linear(rows), expected)
    ours = torch._grouped_mm(rows.flatten(0, 1)[:5], weight.transpose(1, 2), offs=offs)
    torch.testing.assert_close(ours, torch._grouped_mm(rounded_MK[:5], dense.transpose(1, 2), offs=offs))
    assert (rounded_MK.view(rows.shape) - rows).abs().max() > 1e-3


@torch.inference_mode()
def test_linear_maps_and_experts_multiply_by_what_it_means(weight, products):
    dense = weight.dequantised()
    rows = torch.randn(2, 3, 24)
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    linear = nn.Linear(24, 10)
    expected = F.linear(rows, dense[1], linear.bias)
    linear.weight = nn.Parameter(weight[1], requires_grad=False)
    torch.testing.assert_close(linear(rows), expected)
    ours, theirs = (torch._grouped_mm(rows.flatten(0, 1)[:5], w.transpose(1, 2), offs=offs) for w in (weight, dense))
    torch.testing.assert_close(ours, theirs)


def test_a_part_that_ends_within_a_group_of_quantised_activations_is_refused():
    codes = torch.zeros(4, 24).to(torch.float8_e4m3fn)
    weight = QuantisedWeight(codes, torch.ones(1, 3), (8, 8), row_group=8)
    assert weight[:, 8:24].shape == (4, 16) and weight[1:3, :].shape == (2, 24)
    with pytest.raises(ValueError, match="inputs 0 to 12 of 24, is not aligned to groups of 8; set it to false, or .*tp_size"):
        weight[:, :12]
