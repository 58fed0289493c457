"""RMSNorm, and SwiGLU with its down projection, that keep only their inputs for the backward pass.

In plain PyTorch, the norm also keeps the normed rows, and SwiGLU also silu(gate) and its product with
`up`. These are products and sums per element: computing them again costs little next to the matrix
products around them, and they are half of what a block drafter keeps per row.

With x^ = x / rms(x), g = grad * weight and s = sigmoid(gate):

    d norm / d x = (g - x^ mean(g x^)) / rms(x)        d silu(gate) / d gate = s (1 + gate (1 - s))

Shapes: Q rows, D hidden size, F inner features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.kernels.matmul import product
from engine.kernels.reference import upcast


def lean_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute the root-mean-square norm over the last dimension, in fp32 or float64."""
    return _RmsNorm.apply(x, weight_D, eps)


def swiglu_down(gate_QF: Tensor, up_QF: Tensor, weight_DF: Tensor) -> Tensor:
    """Compute `(silu(gate) * up) @ weight.T`, [Q, D]."""
    return _SwigluDown.apply(gate_QF, up_QF, weight_DF)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = upcast(x)
        mean = torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1]
        scale = torch.rsqrt(mean + eps)
        ctx.save_for_backward(x, weight_D, scale)
        return (wide * scale).mul_(weight_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        wide_grad = upcast(grad)
        normed = upcast(x) * scale
        weight_grad_D = (wide_grad * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
        x_grad = wide_grad * weight_D
        mean = torch.linalg.vecdot(x_grad, normed)[..., None] / x.shape[-1]
        x_grad.sub_(normed.mul_(mean)).mul_(scale)
        return x_grad.to(x.dtype), weight_grad_D, None


class _SwigluDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_QF: Tensor, up_QF: Tensor, weight_DF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_QF, up_QF, weight_DF)
        return product(torch.nn.functional.silu(gate_QF).mul_(up_QF), weight_DF.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate_QF, up_QF, weight_DF = ctx.saved_tensors
        silu_QF = torch.nn.functional.silu(gate_QF)
        weight_grad_DF = product(grad_QD.mT, silu_QF * up_QF)
        inner_QF = product(grad_QD, weight_DF)
        up_grad_QF = silu_QF.mul_(inner_QF)
        gate_grad_QF = torch.ops.aten.silu_backward(inner_QF.mul_(up_QF), gate_QF)
        return gate_grad_QF, up_grad_QF, weight_grad_DF
