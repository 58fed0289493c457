"""The convolution mixes the rows of a block as its formula says, and no others, and keeps little for its gradients."""

import pytest
import torch

from engine.models.dflash2 import block_convolution
from engine.models.dflash2.block_convolution import BlockConvolution, convolve_rows
from tests.live_bytes import LiveBytes

SIZE, TAPS, GROUP = 12, 3, 4
OFFSETS = (0, 1, 2, 3, 0, 1, 0, 1, 2)


def make(seed: int = 0) -> BlockConvolution:
    torch.manual_seed(seed)
    convolution = BlockConvolution(SIZE, TAPS, GROUP).double()
    for parameter in convolution.parameters():
        parameter.data.normal_()
    return convolution


def plain(x_PD, base_JD, dynamic_PJG, offset_P):
    """The convolution with kernels of every feature, differentiated by PyTorch."""
    num_taps, size = base_JD.shape
    kernel_PJD = base_JD + dynamic_PJG.repeat_interleave(size // dynamic_PJG.shape[2], -1)
    total_PD = kernel_PJD[:, 0] * x_PD
    for tap in range(1, num_taps):
        earlier_PD = torch.nn.functional.pad(x_PD, (0, 0, tap, 0))[: len(x_PD)]
        total_PD = total_PD + torch.where((offset_P >= tap)[:, None], kernel_PJD[:, tap] * earlier_PD, 0)
    return total_PD


def arguments_of(offsets: tuple[int, ...], taps: int, group: int, num_groups: int, dtype=torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(1)
    shapes = ((len(offsets), group * num_groups), (taps, group * num_groups), (len(offsets), 2, taps, num_groups))
    x_PD, base_JD, dynamic_P2JG = (torch.randn(shape, dtype=dtype) for shape in shapes)
    dynamic_PJG = dynamic_P2JG[:, 1]  # one side of both, as the layers pass it
    return [x.detach().requires_grad_() for x in (x_PD, base_JD, dynamic_PJG)] + [torch.tensor(offsets, dtype=torch.int64)]


@pytest.mark.parametrize("rows_per_piece", [1, 2, 99])
@pytest.mark.parametrize(
    ("offsets", "taps", "group", "num_groups"),
    [(OFFSETS, 3, 4, 3), (OFFSETS, 1, 1, 5), ((0, 1), 4, 7, 1), ((0,) * 3, 2, 3, 3), ((), 2, 2, 3), ((3, 0, 1), 2, 5, 2)],
)
def test_it_equals_the_plain_version_with_all_gradients(offsets, taps, group, num_groups, rows_per_piece, monkeypatch):
    arguments = arguments_of(offsets, taps, group, num_groups)
    monkeypatch.setitem(block_convolution.PIECE_BYTES, "cpu", rows_per_piece * group * num_groups * 8)
    found_PD, expected_PD = (function(*arguments) for function in (convolve_rows, plain))
    torch.testing.assert_close(found_PD, expected_PD, rtol=1e-13, atol=1e-13)
    grad_PD = torch.randn_like(expected_PD)
    found, expected = (torch.autograd.grad(total_PD, arguments[:3], grad_PD) for total_PD in (found_PD, expected_PD))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    if offsets:
        assert torch.autograd.gradcheck(convolve_rows, arguments)


def test_bf16_is_as_close_as_the_plain_version():
    # 40 rows: a gradient of the base kernel is a sum over them, which is rounded once.
    exact = arguments_of(tuple(range(8)) * 5, 2, 4, 3)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact[:3]] + exact[3:]
    exact = [x.detach().double().requires_grad_() for x in rounded[:3]] + exact[3:]
    results = []
    for function, arguments in ((convolve_rows, rounded), (plain, rounded), (plain, exact)):
        total_PD = function(*arguments)
        results.append([total_PD, *torch.autograd.grad(total_PD.double().square().sum(), arguments[:3])])
    for own, other, expected in zip(*results, strict=True):
        own_error, other_error = ((x.double() - expected).norm() for x in (own, other))
        assert own_error <= 1.5 * other_error, "errors of two orders of rounding differ by chance"


def test_it_keeps_its_arguments_alone_and_no_kernel_of_a_feature_lives_long(monkeypatch):
    arguments = arguments_of(tuple(range(16)) * 8, 2, 16, 4, torch.float32)
    x_PD = arguments[0]
    monkeypatch.setitem(block_convolution.PIECE_BYTES, "cpu", x_PD.nbytes // 16)
    live = LiveBytes()
    with live:
        total_PD = convolve_rows(*arguments)
        assert live.now() == total_PD.nbytes
        assert live.peak < 1.2 * total_PD.nbytes
        total_PD.sum().backward()
    gradients = sum(x.grad.nbytes for x in arguments[:3])
    assert live.peak < 1.2 * total_PD.nbytes + gradients


def test_each_row_is_the_sum_over_the_rows_before_it_in_its_block():
    convolution = make()
    x_PD, y_PD = torch.randn(2, len(OFFSETS), SIZE, dtype=torch.float64)
    dynamic_P2JG = convolution.dynamic_kernels(y_PD)
    for side in (0, 1):
        found_PD = convolution(x_PD, side, dynamic_P2JG[:, side], torch.tensor(OFFSETS))
        for row, offset in enumerate(OFFSETS):
            dynamic_2JG = (convolution.kernel_projection.weight @ y_PD[row]).view(2, TAPS, SIZE // GROUP)
            for feature in range(SIZE):
                expected = 0.0
                for tap in range(min(offset + 1, TAPS)):
                    weight = convolution.base_kernel[side, tap, feature] + dynamic_2JG[side, tap, feature // GROUP]
                    expected += weight * x_PD[row - tap, feature]
                torch.testing.assert_close(found_PD[row, feature], expected)


def test_a_new_convolution_changes_nothing():
    convolution = BlockConvolution(SIZE, TAPS, GROUP)
    x_PD, y_PD = torch.randn(2, len(OFFSETS), SIZE)
    dynamic_P2JG = convolution.dynamic_kernels(y_PD)
    for side in (0, 1):
        assert torch.equal(convolution(x_PD, side, dynamic_P2JG[:, side], torch.tensor(OFFSETS)), x_PD)


def test_no_block_reaches_into_another():
    convolution = make()
    x_PD, y_PD = torch.randn(2, len(OFFSETS), SIZE, dtype=torch.float64)
    dynamic_PJG = convolution.dynamic_kernels(y_PD)[:, 0]
    whole_PD = convolution(x_PD, 0, dynamic_PJG, torch.tensor(OFFSETS))
    for first, end in ((0, 4), (4, 6), (6, 9)):
        alone_PD = convolution(x_PD[first:end], 0, dynamic_PJG[first:end], torch.tensor(OFFSETS[first:end]))
        torch.testing.assert_close(alone_PD, whole_PD[first:end])
