"""DFlash2's causal convolution over the rows of a block, with kernels that depend on the row.

    conv(x)[k, d] = sum over taps j of (base[j, d] + dynamic[k, j, group(d)]) * x[k - j, d]

Rows before the start of the block count as 0. A layer has two sides: its input is convolved with
side 0, the output of its linear map with side 1, and the dynamic kernels of both come from the
normed input.

Shapes: P rows, D features in G groups of `group` features, J taps, p rows of a piece.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.kernels.matmul import linear
from engine.kernels.reference import upcast

# Bytes of rows that are convolved at a time. On a CPU they stay in its cache.
PIECE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}


class BlockConvolution(nn.Module):
    """Convolution of both sides of an attention or an MLP.

    base_kernel: [2, J, D]. kernel_projection: [2 * J * G, D].
    """

    def __init__(self, size: int, taps: int, group: int) -> None:
        super().__init__()
        self.taps = taps
        self.base_kernel = nn.Parameter(torch.empty(2, taps, size))
        self.kernel_projection = nn.Linear(size, 2 * taps * (size // group), bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start as the identity."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1
        self.kernel_projection.weight.zero_()

    def dynamic_kernels(self, y_PD: Tensor) -> Tensor:
        """Return the dynamic kernels of both sides for each row, [P, 2, J, G], from the normed input."""
        return linear(y_PD, self.kernel_projection.weight).unflatten(-1, (2, self.taps, -1))

    def forward(self, x_PD: Tensor, side: int, dynamic_PJG: Tensor, offset_P: Tensor) -> Tensor:
        """Convolve rows with the kernels of a side, [P, D].

        dynamic_PJG: dynamic kernels of this side. offset_P: int64, index of each row in its block.
        """
        return convolve_rows(x_PD, self.base_kernel[side], dynamic_PJG, offset_P)


def convolve_rows(x_PD: Tensor, base_JD: Tensor, dynamic_PJG: Tensor, offset_P: Tensor) -> Tensor:
    """Convolve the rows of blocks, [P, D], and keep the arguments only for the backward pass."""
    return _ConvolveRows.apply(x_PD, base_JD, dynamic_PJG, offset_P)


class _ConvolveRows(torch.autograd.Function):
    """With w[k, j] the sum of both kernels where k >= j, and 0 elsewhere:

        d x[k] = sum over j of w[k + j, j] grad[k + j]
        d base[j] = sum over rows k >= j of grad[k] x[k - j]        d dynamic[k, j] = sum over a group of the same

    No kernels of single features outlive a piece of rows.
    """

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, base_JD: Tensor, dynamic_PJG: Tensor, offset_P: Tensor) -> Tensor:
        ctx.save_for_backward(x_PD, base_JD, dynamic_PJG, offset_P)
        num_taps, num_groups = dynamic_PJG.shape[1:]
        x_PGg = x_PD.unflatten(1, (num_groups, -1))
        base_JGg = base_JD.unflatten(1, (num_groups, -1))
        total_PGg = torch.empty_like(x_PGg, memory_format=torch.contiguous_format)
        for rows in _pieces(x_PD):
            total_pGg = total_PGg[rows]
            torch.add(base_JGg[0], dynamic_PJG[rows, 0, :, None], out=total_pGg).mul_(x_PGg[rows])
            for tap in range(1, num_taps):
                later, earlier = _pairs(rows, tap)
                is_in_block_p11 = _is_in_block(offset_P[later], tap).to(x_PD.dtype)
                dynamic_pG1 = dynamic_PJG[later, tap, :, None] * is_in_block_p11
                kernel_pGg = torch.addcmul(dynamic_pG1, base_JGg[tap], is_in_block_p11)
                total_PGg[later].addcmul_(kernel_pGg, x_PGg[earlier])
        return total_PGg.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_PD, base_JD, dynamic_PJG, offset_P = ctx.saved_tensors
        num_taps, num_groups = dynamic_PJG.shape[1:]
        x_PGg = x_PD.unflatten(1, (num_groups, -1))
        base_JGg = base_JD.unflatten(1, (num_groups, -1))
        grad_PGg = grad_PD.unflatten(1, (num_groups, -1))
        x_grad_PGg = torch.zeros_like(x_PGg, memory_format=torch.contiguous_format)
        base_grad_JGg = torch.zeros_like(upcast(base_JGg))
        dynamic_grad_PJG = torch.zeros_like(dynamic_PJG, memory_format=torch.contiguous_format)
        for rows in _pieces(x_PD):
            for tap in range(num_taps):
                later, earlier = _pairs(rows, tap)
                grad_pGg = grad_PGg[later]
                if tap:
                    grad_pGg = grad_pGg * _is_in_block(offset_P[later], tap)
                kernel_pGg = base_JGg[tap] + dynamic_PJG[later, tap, :, None]
                x_grad_PGg[earlier].addcmul_(kernel_pGg, grad_pGg)
                product_pGg = torch.mul(grad_pGg, x_PGg[earlier], out=kernel_pGg)
                base_grad_JGg[tap] += product_pGg.sum(0, dtype=base_grad_JGg.dtype)
                dynamic_grad_PJG[later, tap] = product_pGg.sum(-1)
        base_grad_JD = base_grad_JGg.flatten(1).to(base_JD.dtype)
        return x_grad_PGg.flatten(1), base_grad_JD, dynamic_grad_PJG, None


def _pieces(x_PD: Tensor) -> Iterator[slice]:
    """Yield the rows of each piece."""
    num_rows, size = x_PD.shape
    step = max(1, PIECE_BYTES[x_PD.device.type] // (size * x_PD.itemsize))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def _pairs(rows: slice, tap: int) -> tuple[slice, slice]:
    """Return the rows of a piece that have a row `tap` rows before them, and those rows."""
    first = max(rows.start, min(tap, rows.stop))
    return slice(first, rows.stop), slice(first - tap, rows.stop - tap)


def _is_in_block(offset_p: Tensor, tap: int) -> Tensor:
    """Return whether the row `tap` rows before each row is one of its block, bool [p, 1, 1]."""
    return (offset_p >= tap)[:, None, None]
