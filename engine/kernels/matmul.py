"""Matrix products that are fast on every processor.

On a CPU, fp32 products use oneDNN on processors of other vendors than Intel that have AVX-512, which
oneDNN runs on all of them and MKL on Intel's only. Elsewhere they use MKL, which is at least as fast
and needs no copy of a weight whose layout does not suit it. Half-precision products are computed in
fp32 if the processor has no instructions for them. PyTorch's own fallback is about 80 times slower
there (AVX2, torch 2.13), and the result is the same sum, rounded once.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LARGE_PRODUCT = 1 << 22  # multiplications per pair from which oneDNN per pair beats one MKL call


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Compute `a @ b`, [M, N]. Not differentiable."""
    if _is_emulated(a_MK):
        return product(a_MK.float(), b_KN.float()).to(a_MK.dtype)
    if _through_onednn(a_MK) and a_MK.numel() and b_KN.numel():
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.mT, None, "none", [], "")
    return a_MK @ b_KN


def add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """Add `a @ b` to a sum in place. The sum may have a higher precision. Not differentiable."""
    if sum_MN.dtype == a_MK.dtype and adds_in_place(a_MK):
        sum_MN.addmm_(a_MK, b_KN)
    elif _through_onednn(a_MK) and a_MK.mT.is_contiguous():
        sum_MN += product(b_KN.mT, a_MK.mT).mT  # oneDNN would copy `a`
    else:
        sum_MN += product(a_MK, b_KN)


def adds_in_place(x: Tensor) -> bool:
    """Return whether `add_product` of tensors like `x` needs no temporary tensor and keeps the sum in fp32 or float64."""
    return x.dtype in (torch.float32, torch.float64) and not _through_onednn(x)


def batched_product(a_GMK: Tensor, b_GKN: Tensor) -> Tensor:
    """Compute `a[g] @ b[g]` for every g, [G, M, N]. Not differentiable."""
    if _is_emulated(a_GMK):
        return batched_product(a_GMK.float(), b_GKN.float()).to(a_GMK.dtype)
    if _through_onednn(a_GMK) and a_GMK[0].numel() * b_GKN.shape[2] >= LARGE_PRODUCT:
        return torch.stack([product(a_MK, b_KN) for a_MK, b_KN in zip(a_GMK, b_GKN, strict=True)])
    return torch.bmm(a_GMK, b_GKN)


def linear(x_QK: Tensor, weight_NK: Tensor) -> Tensor:
    """Compute `x @ weight.T`, [Q, N]. Differentiable."""
    if _through_onednn(x_QK) or _is_emulated(x_QK):
        return _Linear.apply(x_QK, weight_NK)
    return nn.functional.linear(x_QK, weight_NK)


class Linear(nn.Linear):
    """Linear layer without bias for two-dimensional inputs, computed by `linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x_QK: Tensor) -> Tensor:
        return linear(x_QK, self.weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_QK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_QK if ctx.needs_input_grad[1] else None, weight_NK if ctx.needs_input_grad[0] else None)
        return product(x_QK, weight_NK.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QN: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_QK, weight_NK = ctx.saved_tensors
        return (
            None if weight_NK is None else product(grad_QN, weight_NK),
            None if x_QK is None else product(grad_QN.mT, x_QK),
        )


def _through_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_is_faster()


@lru_cache
def _onednn_is_faster() -> bool:
    """Return whether fp32 products are faster in oneDNN than in what PyTorch calls by itself."""
    if not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkl.is_available():
        return True
    processor = _processor()
    return "GenuineIntel" not in processor and "avx512f" in processor.split()


def _processor(file: Path = Path("/proc/cpuinfo")) -> str:
    """Return the description of the processors; "" where there is none, as outside Linux."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _is_emulated(x: Tensor) -> bool:
    """Return whether products in the dtype of `x` lack a fast path on its device."""
    return x.device.type == "cpu" and not _has_fast_products(x.dtype)


@lru_cache
def _has_fast_products(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices of `dtype` through oneDNN."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True
