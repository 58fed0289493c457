"""DFlash2's causal convolution over the rows of a block, with kernels that depend on the row.

    conv(x)[k, d] = sum over taps j of (base[j, d] + dynamic[k, j, group(d)]) * x[k - j, d]

Rows before the start of the block count as 0. A layer has two sides: its input is convolved with
side 0, the output of its linear map with side 1, and the dynamic kernels of both come from the
normed input.
"""

import torch
from torch import Tensor, nn

from engine.kernels.matmul import linear


class BlockConvolution(nn.Module):
    """Convolution of both sides of an attention or an MLP.

    base_kernel: [2, taps, D]. kernel_projection: [2 * taps * D / group, D].
    """

    def __init__(self, size: int, taps: int, group: int) -> None:
        super().__init__()
        self.taps = taps
        self.group = group
        self.base_kernel = nn.Parameter(torch.empty(2, taps, size))
        self.kernel_projection = nn.Linear(size, 2 * taps * (size // group), bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start as the identity."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1
        self.kernel_projection.weight.zero_()

    def kernels(self, y_PD: Tensor) -> Tensor:
        """Return the kernels of both sides for each row, [P, 2, taps, D], from the normed input."""
        flat_PK = linear(y_PD, self.kernel_projection.weight)
        dynamic_P2JG = flat_PK.unflatten(-1, (2, self.taps, -1))
        return self.base_kernel + dynamic_P2JG.repeat_interleave(self.group, -1)

    def forward(self, x_PD: Tensor, kernel_PJD: Tensor, offset_P: Tensor) -> Tensor:
        """Convolve rows, [P, D]. kernel_PJD: of one side. offset_P: int64, index of each row in its block."""
        total_PD = kernel_PJD[:, 0] * x_PD
        for tap in range(1, self.taps):
            earlier_PD = torch.nn.functional.pad(x_PD, (0, 0, tap, 0))[: len(x_PD)]
            is_in_block_P1 = (offset_P >= tap)[:, None]
            total_PD = total_PD + torch.where(is_in_block_P1, kernel_PJD[:, tap] * earlier_PD, 0)
        return total_PD
