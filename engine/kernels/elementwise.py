"""RMSNorm, SwiGLU and rotary embedding, in plain PyTorch and by liger-kernel for GPUs.

Shapes: Q rows, H query heads, G key heads, E head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.reference import upcast

CosSin = tuple[Tensor, Tensor]  # fp32 [Q, 1, E] each


def rotate(x_QHE: Tensor, cos_sin: CosSin) -> Tensor:
    """Apply rotary embedding to the pairs (e, e + E/2), in fp32."""
    cos, sin = cos_sin
    wide_QHE = upcast(x_QHE)
    first, second = wide_QHE.chunk(2, -1)
    return (wide_QHE * cos + torch.cat((-second, first), -1) * sin).to(x_QHE.dtype)


def rotate_both(query_QHE: Tensor, key_QGE: Tensor, cos_sin: CosSin) -> tuple[Tensor, Tensor]:
    """Apply `rotate` to queries and keys at the same positions."""
    return rotate(query_QHE, cos_sin), rotate(key_QGE, cos_sin)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute the root-mean-square norm over the last dimension."""
    return torch.nn.functional.rms_norm(x, weight_D.shape, weight_D, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


@dataclass(frozen=True)
class Elementwise:
    """One implementation of each function above, with the same signature."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    rotate_both: Callable[[Tensor, Tensor, CosSin], tuple[Tensor, Tensor]] = rotate_both


def liger_elementwise() -> Elementwise:
    """Return liger-kernel's functions. Raises ImportError if it is not installed."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight_D, eps, 0.0, "llama", False)

    def rope(query_QHE: Tensor, key_QGE: Tensor, cos_sin: CosSin) -> tuple[Tensor, Tensor]:
        # liger-kernel rotates in place, in the layout [1, heads, Q, E].
        query_1HQE = query_QHE.transpose(0, 1)[None]
        key_1GQE = key_QGE.transpose(0, 1)[None]
        cos_1QE, sin_1QE = (table_Q1E.transpose(0, 1) for table_Q1E in cos_sin)
        # Some versions return further entries, which are not needed.
        query_1HQE, key_1GQE = LigerRopeFunction.apply(query_1HQE, key_1GQE, cos_1QE, sin_1QE)[:2]
        return query_1HQE[0].transpose(0, 1), key_1GQE[0].transpose(0, 1)

    return Elementwise(norm, LigerSiLUMulFunction.apply, rope)
