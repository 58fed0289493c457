"""Gather and scatter of rows of a tensor."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Row counts are rounded up to a multiple of this. On a CPU, every new size of a matrix product is
# compiled again; on a GPU, counts that differ at every step fragment the memory of PyTorch's
# allocator.
ROW_GRANULE = {"cpu": 32, "cuda": 128}


def take_rows(x: Tensor, index_Q: Tensor) -> Tensor:
    """Return `x[index_Q]` along the first dimension. index_Q: int64 [Q] without repeats."""
    return _TakeRows.apply(x, index_Q)


def add_rows(sum_M: Tensor, index_Q: Tensor, x_Q: Tensor, is_tree: bool) -> None:
    """Compute `sum_M[index_Q] += x_Q` in place, in a fixed order. sum_M must be zero before.

    is_tree: whether indices may repeat, or be negative; rows with a negative index are dropped.
    """
    if is_tree:
        present_Q = (index_Q >= 0).view(-1, *[1] * (x_Q.dim() - 1))
        sum_M.index_put_((index_Q.clamp_min(0),), torch.where(present_Q, x_Q, 0).to(sum_M.dtype), accumulate=True)
    else:
        sum_M.index_copy_(0, index_Q, x_Q.to(sum_M.dtype))


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index_Q: Tensor) -> Tensor:
        ctx.save_for_backward(index_Q)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index_Q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index_Q,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, index_Q, grad), None
