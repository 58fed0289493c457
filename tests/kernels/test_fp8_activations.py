"""Rows quantised to fp8, times fp8 weights, are what their codes and scales mean, whatever the sizes, blocks and experts."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from tests.kernels.fp8_cases import draw_weights, exact_product, to_device

kernel = pytest.importorskip("engine.kernels.fp8_activations", reason="the kernel is written in Triton, which is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the interpreter runs it

# Outputs, inputs, the block of a scale and the group of a row's inputs: whole blocks of the published size, and cut short; what
# cuts by ranks may leave of them; rows in smaller groups than weights; blocks that no tensor core multiplies in.
WEIGHTS = {
    "published": (256, 384, (128, 128), 128),
    "cut short": (131, 197, (128, 128), 128),
    "halved": (192, 320, (64, 64), 128),
    "quartered": (101, 160, (32, 32), 128),
    "small groups": (70, 150, (128, 128), 32),
    "odd": (37, 61, (12, 20), 20),
    "by value": (17, 19, (1, 1), 128),
    "row": (1, 64, (128, 128), 128),
}
COUNTS = {"one": [1], "several": [70], "tiles": [131], "experts": [3, 0, 40, 1, 0], "none of some": [0, 0, 5], "none": [0, 0]}


class Case(NamedTuple):
    """The arguments of `fp8_activations`."""

    rows_MK: Tensor
    codes_XNK: Tensor
    scale_XGJ: Tensor
    block: tuple[int, int]
    ends_X: Tensor | None
    group: int

    def of(self, product) -> Tensor:
        *positional, group = self
        return product(*positional, group=group)

    def exact(self, of_rounded: bool = True) -> Tensor:
        """In float64, of what the codes of the rows mean, or of the rows themselves."""
        weight_XNK = reference.dequantised(self.codes_XNK, self.scale_XGJ, (1, *self.block), torch.float64)
        rows_MK = self.rows_MK.double()
        if of_rounded:
            codes_MK, scale_MJ = reference.quantised_rows(self.rows_MK, self.group)
            rows_MK = codes_MK.double() * scale_MJ.double().repeat_interleave(self.group, 1)[:, : codes_MK.shape[1]]
        return exact_product(rows_MK, weight_XNK, self.ends_X)


def make_case(weight: str, counts: list[int], dtype: torch.dtype = torch.float32) -> Case:
    g = torch.Generator().manual_seed(3)
    num_outputs, num_inputs, block, group = WEIGHTS[weight]
    weights = draw_weights(num_outputs, num_inputs, block, counts, g)
    rows = torch.randn(sum(counts), num_inputs, generator=g) * torch.logspace(-3, 1, num_inputs)
    rows[::7], rows[1::5, :1] = 0, 1000.0  # rows of zeros; a value that leaves the others of its group few bits
    rows, codes, scale, ends = to_device(DEVICE, rows.to(dtype), *weights)
    return Case(rows, codes, scale, block, ends, group)


def errors(case: Case) -> tuple[float, float, float]:
    """Ours, that of plain PyTorch, and the size of what is computed, each the root of a sum of squares."""
    exact_MN = case.exact()
    ours_MN, plain_MN = (case.of(product) for product in (kernel.fp8_activations, reference.fp8_activations))
    return (ours_MN - exact_MN).norm().item(), (plain_MN - exact_MN).norm().item(), exact_MN.norm().item()


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_it_errs_at_most_twice_as_much_as_plain_pytorch(weight, counts):
    ours, plain, size = errors(make_case(weight, COUNTS[counts]))
    # one row of few products may round luckily: a rounding of fp32 beside it
    assert ours <= 2 * plain + 2**-22 * size


@pytest.mark.parametrize("weight", ["published", "cut short", "halved", "odd"])
def test_rows_in_fp16_are_rounded_to_theirs_at_the_end(weight):
    case = make_case(weight, COUNTS["experts"], torch.float16)
    ours, plain, size = errors(case)
    # where fp8 cannot be multiplied, rows and weights are rounded to fp16 before the product
    assert case.of(kernel.fp8_activations).dtype == torch.float16 and ours <= 2 * plain + 2**-11 * size


@pytest.mark.parametrize("weight", ["published", "cut short", "halved"])
def test_gpus_that_cannot_multiply_fp8_compute_the_same(weight, monkeypatch):
    case = make_case(weight, COUNTS["experts"])
    expected_MN = case.of(kernel.fp8_activations)
    monkeypatch.setattr(kernel, "reads_fp8", lambda device: False)
    monkeypatch.setattr(kernel, "_product_kernel", None)
    # rows and weights are rounded to fp32 before the product, and it adds in another order
    assert (case.of(kernel.fp8_activations) - expected_MN).norm() <= 1e-6 * expected_MN.norm()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_it_differs_from_the_product_of_the_rows_by_their_rounding(weight):
    case = make_case(weight, COUNTS["several"])
    rows_MK, (codes_MK, scale_MJ) = case.rows_MK.double(), reference.quantised_rows(case.rows_MK, case.group)
    step_MK = scale_MJ.double().repeat_interleave(case.group, 1)[:, : codes_MK.shape[1]]
    # half of the last of three bits, or of the smallest step, 2**-9 of a scale
    largest_MK = torch.maximum(rows_MK.abs() * 2**-4, step_MK * 2**-10)
    weight_NK = reference.dequantised(case.codes_XNK[0], case.scale_XGJ[0], case.block, torch.float64)
    difference_MN = (case.of(kernel.fp8_activations) - case.exact(of_rounded=False)).abs()
    assert (difference_MN <= largest_MK @ weight_NK.abs().T * 1.001).all()
    assert difference_MN.norm() > 1e-4 * case.exact().norm(), "far above the rounding of fp32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [128, 64, 20])
def test_rows_are_quantised_as_plain_pytorch_does(group, dtype):
    rows_MK = (torch.randn(37, 300) * torch.logspace(-4, 3, 37)[:, None]).to(DEVICE, dtype)
    rows_MK[3], rows_MK[5, 130:] = 0, 0
    apart_MK = torch.nn.functional.pad(rows_MK, (0, 3), value=torch.nan)[:, :-3]
    codes_MK, scale_JM = kernel.quantise_rows(apart_MK, group, multiple=4)
    expected_MK, expected_MJ = reference.quantised_rows(rows_MK, group)
    assert codes_MK.shape == (40, 300) and torch.equal(scale_JM.T[:37], expected_MJ)
    assert torch.equal(codes_MK[:37].float(), expected_MK.float())
    assert expected_MK.float().abs().amax() == reference.LARGEST and not expected_MK[3].float().any()


def test_halves_round_to_even_and_nothing_overflows():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = codes[codes.isfinite()].unique()
    halves = (values[1:] + values[:-1]) / 2
    values = torch.cat((values, halves, torch.nextafter(halves, 2 * halves), torch.nextafter(halves, 0 * halves)))
    rows_MK = torch.stack((values, torch.full_like(values, reference.LARGEST)), 1).to(DEVICE)  # whose scale is 1
    codes_MK, scale_JM = kernel.quantise_rows(rows_MK, 2)
    assert (scale_JM == 1).all() and torch.equal(codes_MK.float(), rows_MK.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_hidden(bad):
    case = make_case("published", COUNTS["several"])
    case.rows_MK[2, 5] = bad
    for product in (kernel.fp8_activations, reference.fp8_activations):
        out_MN = case.of(product)
        assert not out_MN[2].isfinite().any() and out_MN[:2].isfinite().all() and out_MN[3:].isfinite().all()


def test_weights_may_be_views():
    case = make_case("cut short", COUNTS["experts"])
    codes_XNK, scale_XGJ = (tensor.mT.contiguous().mT for tensor in (case.codes_XNK, case.scale_XGJ))
    other = case._replace(codes_XNK=codes_XNK, scale_XGJ=scale_XGJ)
    assert torch.equal(other.of(kernel.fp8_activations), case.of(kernel.fp8_activations))


def test_rows_behind_the_last_end_change_nothing():
    case = make_case("cut short", COUNTS["experts"])
    more = case._replace(rows_MK=torch.cat((case.rows_MK, torch.full_like(case.rows_MK[:3], torch.nan))))
    assert torch.equal(more.of(kernel.fp8_activations)[:-3], case.of(kernel.fp8_activations))


def test_cublas_is_asked_for_many_rows_of_one_weight_in_whole_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "_has_cublas_blocks", lambda device: True)

    def suits(rows=1024, outputs=256, inputs=512, block=(128, 128), group=128, experts=1, dtype=torch.bfloat16, start=0):
        rows_MK = torch.empty(rows, inputs, dtype=dtype)
        codes_XNK = torch.empty(experts, outputs, inputs + start, dtype=torch.float8_e4m3fn)[..., start:]
        scale_XGJ = torch.empty(experts, -(-outputs // block[0]), -(-inputs // block[1]))
        return kernel._suits_cublas(rows_MK, codes_XNK, scale_XGJ, block, group)

    assert suits() and suits(rows=4099, inputs=2048)
    others = dict(rows=1023), dict(outputs=192), dict(inputs=640), dict(block=(128, 64)), dict(group=64), dict(experts=2)
    assert not any(suits(**changed) for changed in (*others, dict(dtype=torch.float16), dict(start=512)))
    monkeypatch.undo()
    assert not kernel._has_cublas_blocks(torch.device("cpu"))


def test_pytorch_takes_the_scales_in_the_layout_that_cublas_is_given():
    codes_MK, codes_NK = (torch.empty(rows, 512, dtype=torch.float8_e4m3fn, device="meta") for rows in (1028, 384))
    row_scale_JM = torch.empty(4, 1028, device="meta")
    scale_GJ = torch.empty(3, 4, device="meta")
    out_MN = kernel._cublas_product(codes_MK, row_scale_JM, codes_NK, scale_GJ, torch.bfloat16)
    assert out_MN.shape == (1028, 384) and out_MN.dtype == torch.bfloat16
    with pytest.raises((RuntimeError, ValueError), match="scale"):
        kernel._cublas_product(codes_MK, row_scale_JM[:, :-4], codes_NK, scale_GJ, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the kernel is interpreted above, not compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_for_a_gpu_it_errs_at_most_twice_as_much_as_plain_pytorch(dtype):
    for weight in WEIGHTS:
        for counts in ([1], [300], [3, 0, 400, 1, 0], [20] * 256):
            ours, plain, size = errors(make_case(weight, counts, dtype))
            # Hopper's tensor cores keep 13 bits of a step's sum; dequantised weights are rounded to the rows' precision
            assert ours <= 2 * plain + 2**-9 * size


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: cuBLASLt is NVIDIA's")
@pytest.mark.parametrize("num_rows", [1024, 1101])
def test_cublas_computes_the_same_as_plain_pytorch(num_rows, monkeypatch):
    if not kernel._has_cublas_blocks(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU, CUDA 12.9 and PyTorch 2.10")
    monkeypatch.setitem(WEIGHTS, "many", (384, 1024, (128, 128), 128))
    monkeypatch.setattr(kernel, "_product_kernel", None)
    ours, plain, size = errors(make_case("many", [num_rows], torch.bfloat16))
    assert ours <= 2 * plain + 2**-10 * size
