"""Permuting and un-permuting rows in one launch gives what plain PyTorch gives, whatever the sizes and strides."""

import pytest
import torch
from torch import Tensor

from engine.kernels import reference

kernel = pytest.importorskip("engine.kernels.token_permute", reason="the kernel is written in Triton, which is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the interpreter runs it, see conftest.py
WIDTHS = (1, 48, 2049)  # one value, less than a block, and one value of a second block


def draw(count: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator).to(dtype).to(DEVICE)


def spaced(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised rows with room between them, as in a buffer of records."""
    return torch.full((count, width + 3), 7, device=DEVICE).to(dtype)[:, :width]


def places(count: int, num_slots: int, num_rows: int) -> Tensor:
    """int64 [T, J]: each row in at most one place, some places empty, the last token without any."""
    generator = torch.Generator().manual_seed(1)
    place_S = torch.full((count * num_slots,), -1)
    taken = torch.randperm((count - 1) * num_slots, generator=generator)[:num_rows]
    place_S[taken] = torch.arange(num_rows)
    return place_S.view(count, num_slots).to(DEVICE)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_gathered_bit_for_bit(width, dtype):
    rows_TD = draw(5, width, dtype)
    source_N = torch.tensor([4, 0, 0, 3], device=DEVICE)
    found_ND = kernel.permute_rows(rows_TD, source_N, spaced(4, width, dtype))
    assert torch.equal(found_ND, rows_TD[source_N])
    assert torch.equal(reference.permute_rows(rows_TD, source_N, spaced(4, width, dtype)), rows_TD[source_N])


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_quantised_to_the_codes_of_pytorch(width):
    rows_TD = draw(6, width) * torch.tensor([1.0, 1e-12, 0.0, 1e4, 1e-3, 1.0], device=DEVICE)[:, None]
    for source_N in (None, torch.tensor([5, 1, 1, 2], device=DEVICE)):
        count = 6 if source_N is None else 4
        found = spaced(count, width, torch.uint8).view(torch.float8_e4m3fn), torch.empty(count, device=DEVICE)
        expected = spaced(count, width, torch.uint8).view(torch.float8_e4m3fn), torch.empty(count, device=DEVICE)
        kernel.quantise_rows(rows_TD, source_N, *found)
        reference.quantise_rows(rows_TD, source_N, *expected)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0].float(), expected[0].float())


def test_codes_mean_the_row_within_the_stated_error():
    rows_TD = draw(4, 300)
    codes_TD = torch.empty(4, 300, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale_T = torch.empty(4, device=DEVICE)
    kernel.quantise_rows(rows_TD, None, codes_TD, scale_T)
    back_TD = kernel.permute_rows(codes_TD, torch.arange(4, device=DEVICE), spaced(4, 300), scale_T)
    # half a unit in the last place of three bits of fraction; of subnormal numbers, whose unit is 2**-9
    bound_TD = torch.maximum(rows_TD.abs() / 16, scale_T[:, None] * 2.0**-10) * (1 + 1e-6)
    assert ((back_TD - rows_TD).abs() <= bound_TD).all()
    assert (back_TD - rows_TD).abs().max() > 0


def test_every_code_is_read_and_written_as_pytorch_does():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes % 128 != 127].view(torch.float8_e4m3fn).to(DEVICE)  # those of NaN aside
    read_1D = kernel.permute_rows(
        codes[None], torch.zeros(1, dtype=torch.int64, device=DEVICE), spaced(1, len(codes)), torch.ones(1, device=DEVICE)
    )
    assert torch.equal(read_1D[0], codes.float())
    written_1D = torch.empty_like(codes[None])
    scale_1 = torch.empty(1, device=DEVICE)
    kernel.quantise_rows(read_1D, None, written_1D, scale_1)
    assert scale_1.item() == 1 and torch.equal(written_1D[0].float(), codes.float())


def test_a_row_with_a_nan_stays_one():
    rows_TD = draw(2, 8)
    rows_TD[0, 3] = torch.nan
    codes_TD = torch.empty(2, 8, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale_T = torch.empty(2, device=DEVICE)
    kernel.quantise_rows(rows_TD, None, codes_TD, scale_T)
    back_TD = kernel.permute_rows(codes_TD, torch.arange(2, device=DEVICE), spaced(2, 8), scale_T)
    assert back_TD[0].isnan().all() and back_TD[1].isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_err_at_most_twice_as_much_as_plain_pytorch(width, weighted):
    rows_MD = draw(9, width)
    place_TJ = places(6, 3, 9)
    weight_TJ = draw(6, 5, seed=2)[:, 1:4] if weighted else None  # a view with room between its rows
    exact_TD = torch.zeros(6, width, dtype=torch.float64, device=DEVICE)
    for t, j in (place_TJ >= 0).nonzero().tolist():
        weight = 1.0 if weight_TJ is None else weight_TJ[t, j].double()
        exact_TD[t] += weight * rows_MD[place_TJ[t, j]].double()
    ours = kernel.unpermute_rows(rows_MD, place_TJ, spaced(6, width), weight_TJ)
    plain = reference.unpermute_rows(rows_MD, place_TJ, spaced(6, width), weight_TJ)
    assert (ours - exact_TD).norm() <= 2 * (plain - exact_TD).norm() + 1e-6 * exact_TD.norm()
    assert (plain - exact_TD).norm() <= 1e-6 * exact_TD.norm()
    assert not ours[-1].any()


def test_sums_of_bf16_rows_are_rounded_once():
    rows_MD = torch.tensor([[256.0], [1.0], [1.0]], device=DEVICE).bfloat16()
    place_TJ = torch.tensor([[0, 1, 2]], device=DEVICE)
    for unpermute_rows in (kernel.unpermute_rows, reference.unpermute_rows):
        assert unpermute_rows(rows_MD, place_TJ, rows_MD.new_empty(1, 1)).item() == 258  # 256 + 1 is 256 in bf16


def test_what_has_no_place_does_not_spread():
    rows_MD = torch.full((1, 4), torch.nan, device=DEVICE)
    weight_TJ = torch.full((2, 2), torch.nan, device=DEVICE)
    rows_MD = torch.cat((rows_MD, torch.ones(1, 4, device=DEVICE)))
    weight_TJ[0, 1] = 2
    place_TJ = torch.tensor([[-1, 1], [-1, -1]], device=DEVICE)
    for unpermute_rows in (kernel.unpermute_rows, reference.unpermute_rows):
        assert unpermute_rows(rows_MD, place_TJ, spaced(2, 4), weight_TJ).tolist() == [[2.0] * 4, [0.0] * 4]


def test_codes_are_summed_as_what_they_mean():
    rows_MD = draw(9, 48)
    place_TJ = places(6, 3, 9)
    codes_MD = torch.empty(9, 48, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale_M = torch.empty(9, device=DEVICE)
    reference.quantise_rows(rows_MD, None, codes_MD, scale_M)
    weight_TJ = scale_M[place_TJ.clamp_min(0)]
    expected_TD = reference.unpermute_rows(codes_MD.float() * scale_M[:, None], place_TJ, spaced(6, 48))
    for unpermute_rows in (kernel.unpermute_rows, reference.unpermute_rows):
        torch.testing.assert_close(unpermute_rows(codes_MD, place_TJ, spaced(6, 48), weight_TJ), expected_TD)


def test_nothing_in_gives_nothing():
    none_0D = draw(0, 4)
    source_0 = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for module in (kernel, reference):
        assert module.permute_rows(none_0D, source_0, spaced(0, 4)).shape == (0, 4)
        assert not module.unpermute_rows(none_0D, torch.full((2, 3), -1, device=DEVICE), spaced(2, 4)).any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the kernels are interpreted above, not compiled")
def test_compiled_for_a_gpu_sums_are_the_same_in_every_run():
    rows_MD = draw(4096, 4096, torch.bfloat16)
    place_TJ = places(1025, 8, 4096)
    first, second = (kernel.unpermute_rows(rows_MD, place_TJ, rows_MD.new_empty(1025, 4096)) for _ in range(2))
    plain = reference.unpermute_rows(rows_MD, place_TJ, rows_MD.new_empty(1025, 4096))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, plain)
