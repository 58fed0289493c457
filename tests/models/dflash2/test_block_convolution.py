"""The convolution mixes the rows of a block as its formula says, and no others."""

import torch

from engine.models.dflash2.block_convolution import BlockConvolution

SIZE, TAPS, GROUP = 12, 3, 4
OFFSETS = (0, 1, 2, 3, 0, 1, 0, 1, 2)


def make(seed: int = 0) -> BlockConvolution:
    torch.manual_seed(seed)
    convolution = BlockConvolution(SIZE, TAPS, GROUP).double()
    for parameter in convolution.parameters():
        parameter.data.normal_()
    return convolution


def test_each_row_is_the_sum_over_the_rows_before_it_in_its_block():
    convolution = make()
    x_PD, y_PD = torch.randn(2, len(OFFSETS), SIZE, dtype=torch.float64)
    kernel_P2JD = convolution.kernels(y_PD)
    for side in (0, 1):
        found_PD = convolution(x_PD, kernel_P2JD[:, side], torch.tensor(OFFSETS))
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
    kernel_P2JD = convolution.kernels(y_PD)
    for side in (0, 1):
        assert torch.equal(convolution(x_PD, kernel_P2JD[:, side], torch.tensor(OFFSETS)), x_PD)


def test_no_block_reaches_into_another():
    convolution = make()
    x_PD, y_PD = torch.randn(2, len(OFFSETS), SIZE, dtype=torch.float64)
    kernel_PJD = convolution.kernels(y_PD)[:, 0]
    whole_PD = convolution(x_PD, kernel_PJD, torch.tensor(OFFSETS))
    for first, end in ((0, 4), (4, 6), (6, 9)):
        alone_PD = convolution(x_PD[first:end], kernel_PJD[first:end], torch.tensor(OFFSETS[first:end]))
        torch.testing.assert_close(alone_PD, whole_PD[first:end])
