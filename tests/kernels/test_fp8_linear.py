"""Rows times fp8 weights, dequantised on the chip, are rows times those weights, whatever the sizes, blocks and experts."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from tests.kernels.fp8_cases import draw_weights, exact_product, to_device

kernel = pytest.importorskip("engine.kernels.fp8_linear", reason="the kernel is written in Triton, which is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the interpreter runs it, see conftest.py

# Outputs, inputs, and the block of a scale: whole blocks of the published size, and cut short; what a cut by ranks may leave of
# them; blocks that no tile divides into; a scale for each value; one output.
WEIGHTS = {
    "published": (256, 256, (128, 128)),
    "cut short": (131, 197, (128, 128)),
    "halved": (96, 160, (32, 32)),
    "odd": (37, 61, (12, 20)),
    "by value": (17, 19, (1, 1)),
    "row": (1, 64, (128, 128)),
}
COUNTS = {"one": [1], "several": [70], "experts": [3, 0, 40, 1, 0], "none of some": [0, 0, 5], "none": [0, 0]}


class Case(NamedTuple):
    """The arguments of `fp8_linear`."""

    rows_MK: Tensor
    codes_XNK: Tensor
    scale_XGJ: Tensor
    block: tuple[int, int]
    ends_X: Tensor | None

    def exact(self) -> Tensor:
        """In float64, of the weight that was dequantised to the precision of the rows."""
        weight_XNK = reference.dequantised(self.codes_XNK, self.scale_XGJ, (1, *self.block), self.rows_MK.dtype)
        return exact_product(self.rows_MK, weight_XNK, self.ends_X)


def make_case(weight: str, counts: list[int], dtype: torch.dtype = torch.float32) -> Case:
    g = torch.Generator().manual_seed(3)
    num_outputs, num_inputs, block = WEIGHTS[weight]
    weights = draw_weights(num_outputs, num_inputs, block, counts, g)
    rows = torch.randn(sum(counts), num_inputs, generator=g).to(dtype)
    rows, codes, scale, ends = to_device(DEVICE, rows, *weights)
    return Case(rows, codes, scale, block, ends)


def errors(case: Case) -> tuple[float, float, float]:
    """Ours, that of plain PyTorch, and the size of what is computed, each the root of a sum of squares."""
    exact_MN = case.exact()
    return (
        (kernel.fp8_linear(*case) - exact_MN).norm().item(),
        (reference.fp8_linear(*case) - exact_MN).norm().item(),
        exact_MN.norm().item(),
    )


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_it_errs_at_most_twice_as_much_as_plain_pytorch(weight, counts):
    ours, plain, size = errors(make_case(weight, COUNTS[counts]))
    assert ours <= 2 * plain + 1e-6 * size


@pytest.mark.parametrize("weight", WEIGHTS)
def test_in_fp16_it_errs_at_most_twice_as_much_as_plain_pytorch(weight):
    # in bf16 the interpreter multiplies raw bits
    ours, plain, size = errors(make_case(weight, COUNTS["experts"], torch.float16))
    assert ours <= 2 * plain + 1e-6 * size


@pytest.mark.parametrize("weight", WEIGHTS)
def test_gpus_without_fp8_read_its_bits_as_the_same_numbers(weight, monkeypatch):
    case = make_case(weight, COUNTS["experts"])
    expected = kernel.fp8_linear(*case)
    monkeypatch.setattr(kernel, "reads_fp8", lambda device: False)
    assert torch.equal(kernel.fp8_linear(*case), expected)


def test_every_code_means_what_pytorch_says():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes % 128 != 127].view(torch.float8_e4m3fn).to(DEVICE)
    case = Case(torch.eye(len(codes), device=DEVICE), codes[None, None], torch.ones(1, 1, 2, device=DEVICE), (128, 128), None)
    for reads_fp8 in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "reads_fp8", lambda device, reads=reads_fp8: reads)
            assert torch.equal(kernel.fp8_linear(*case)[:, 0], codes.float())


def test_weights_may_be_views_and_rows_lie_apart():
    case = make_case("odd", COUNTS["experts"])
    apart_MK = torch.nn.functional.pad(case.rows_MK, (0, 3), value=torch.nan)[:, :-3]
    codes_XNK, scale_XGJ = (tensor.mT.contiguous().mT for tensor in (case.codes_XNK, case.scale_XGJ))
    other = case._replace(rows_MK=apart_MK, codes_XNK=codes_XNK, scale_XGJ=scale_XGJ)
    assert torch.equal(kernel.fp8_linear(*other), kernel.fp8_linear(*case))


def test_rows_behind_the_last_end_change_nothing():
    case = make_case("odd", COUNTS["experts"])
    more = case._replace(rows_MK=torch.cat((case.rows_MK, torch.full_like(case.rows_MK[:3], torch.nan))))
    assert torch.equal(kernel.fp8_linear(*more)[:-3], kernel.fp8_linear(*case))


@pytest.mark.parametrize("counts", ["several", "experts"])
@pytest.mark.parametrize("weight", ["cut short", "odd"])
def test_few_rows_split_the_inputs_and_add_up_to_the_same(weight, counts, monkeypatch):
    case = make_case(weight, COUNTS[counts])
    assert kernel._part(7, 1, 61, 16) == 61  # nothing is split below `LEAST_PART` inputs per part
    monkeypatch.setattr(kernel, "FEW_ROWS", 100)
    monkeypatch.setattr(kernel, "LEAST_PART", 16)
    parts = []
    original = kernel._part

    def spied(*arguments):
        parts.append((arguments[2], original(*arguments)))
        return parts[-1][1]

    monkeypatch.setattr(kernel, "_part", spied)
    ours, plain, size = errors(case)
    assert ours <= 2 * plain + 1e-6 * size
    ((num_inputs, part),) = parts
    assert part < num_inputs


@pytest.mark.parametrize("reads_fp8", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_dequantised_weight_is_the_plain_one_bit_for_bit(weight, dtype, reads_fp8, monkeypatch):
    monkeypatch.setattr(kernel, "reads_fp8", lambda device: reads_fp8)
    case = make_case(weight, [1, 1])
    ours = kernel.dequantised(case.codes_XNK, case.scale_XGJ, case.block, dtype)
    expected = reference.dequantised(case.codes_XNK, case.scale_XGJ, (1, *case.block), dtype)
    if dtype == torch.float32:
        assert torch.equal(ours, expected)
    else:
        # Triton's interpreter cuts off what a GPU rounds.
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0)


def test_many_rows_multiply_a_weight_that_is_dequantised_once_into_the_same_memory(monkeypatch):
    monkeypatch.setattr(kernel, "MANY_ROWS", 5)
    monkeypatch.setattr(kernel, "SCRATCH", kernel.Scratch())
    case = make_case("cut short", [5])
    assert torch.equal(kernel.fp8_linear(*case), reference.fp8_linear(*case))
    (memory,) = kernel.SCRATCH._memory.values()
    smaller = make_case("odd", [7])
    assert torch.equal(kernel.fp8_linear(*smaller), reference.fp8_linear(*smaller))
    assert [memory] == list(kernel.SCRATCH._memory.values())
    monkeypatch.setattr(kernel, "MAX_SCRATCH_BYTES", 0)
    assert not kernel._suits_dense(case.rows_MK, case.codes_XNK, None)


def test_experts_with_many_rows_need_grouped_products(monkeypatch):
    monkeypatch.setattr(kernel, "MANY_ROWS", 1)
    case = make_case("published", [2, 3])
    assert not kernel._suits_dense(*case[:2], case.ends_X) or DEVICE == "cuda"
    monkeypatch.setattr(kernel, "_has_grouped_products", lambda rows: True)
    assert kernel._suits_dense(*case[:2], case.ends_X)
    calls = []

    def grouped(rows_MK, weight_XKN, *, offs):
        calls.append(offs)
        return reference.grouped_linear(rows_MK, lambda expert: weight_XKN[expert].mT, weight_XKN.shape[2], offs)

    monkeypatch.setattr(torch, "_grouped_mm", grouped)
    assert torch.equal(kernel.fp8_linear(*case), reference.fp8_linear(*case)) and len(calls) == 1
    odd = make_case("odd", [2, 3])
    assert not kernel._suits_dense(*odd[:2], odd.ends_X)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the kernel is interpreted above, not compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_for_a_gpu_it_errs_at_most_twice_as_much_as_plain_pytorch(dtype):
    for weight in WEIGHTS:
        for counts in ([1], [300], [3, 0, 400, 1, 0], [20] * 256):
            ours, plain, size = errors(make_case(weight, counts, dtype))
            assert ours <= 2 * plain + 1e-6 * size
