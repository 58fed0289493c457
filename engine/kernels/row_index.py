"""Taking some rows of a tensor, and putting what belongs to them back."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Row counts are multiples of it. A CPU compiles a matrix product of a new size again; on a GPU, counts that differ at every
# step fragment the memory that PyTorch's allocator keeps.
ROW_GRANULE = {"cpu": 32, "cuda": 128}


def take_rows(x: Tensor, index_Q: Tensor) -> Tensor:
    """`x[index_Q]` along the first dimension; index_Q: int64 [Q] without repeats."""
    return _TakeRows.apply(x, index_Q)


def add_rows(sum_M: Tensor, index_Q: Tensor, x_Q: Tensor, is_tree: bool) -> None:
    """`sum_M[index_Q] += x_Q` over zeros, in a fixed order. Only in a tree may rows repeat, or be negative and go nowhere."""
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
