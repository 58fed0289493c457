"""Flash attention in segments of packed rows, by flash-attn or PyTorch: of the draft's prefix, and of the target's documents.

Checked in the sources of flash-attn 2.7.0 and 2.8.3 and of PyTorch's copy of it: a causal mask is aligned to the bottom right
corner of a segment (flash-attn since 2.1), a window of `left` keys does not count the query's own, segments without queries get
zero gradients, and the log-sum-exp is natural, of scores as they enter the softmax, [H, Q] (flash-attn since 2.7; PyTorch for
CUDA).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM, HEAD_DIM_GRANULE, LEAST_CAPABILITY = 256, 8, (8, 0)  # of flash attention 2


Gradients = tuple[Tensor, Tensor, Tensor]  # of query, key and value


class FlashInputs(NamedTuple):
    """What flash attention reads, all of it dense in the last dimension; cu_queries, cu_keys: starts of segments and their end.

    scaling: factor of the scores; None = E**-0.5. window: keys that a query sees at most, its own among them; softcap: of the
    scores; both None where there is none. longest: of the segments, where the host knows.
    """

    query_QHE: Tensor
    key_TGE: Tensor
    value_TGE: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    longest: int | None = None

    @property
    def scale(self) -> float:
        return self.query_QHE.shape[2] ** -0.5 if self.scaling is None else self.scaling

    @property
    def segments(self) -> tuple[Tensor, Tensor, int, int]:
        """Starts of queries and of keys, and most of each in a segment: bounds, where the device alone knows the lengths.

        Never one query at most: from that, flash attention concludes that every segment has one.
        """
        most_queries, most_keys = (self.longest or len(x) for x in (self.query_QHE, self.key_TGE))
        return self.cu_queries, self.cu_keys, max(most_queries, 2), most_keys

    @property
    def window_sizes(self) -> dict[str, int]:
        left, right = (-1, -1) if self.window is None else (self.window - 1, 0)
        return {"window_size_left": left, "window_size_right": right}


@dataclass(frozen=True)
class FlashAttention:
    """An implementation of causal attention in segments, aligned to their bottom right corner.

    forward: inputs -> output [Q, H, E] and its log-sum-exp, fp32 [H, Q], both dense. backward: inputs without window and cap,
    gradient of the output, output, log-sum-exp -> gradients of queries, keys and values; the last two of the arguments may be
    those of a softmax over further keys too. has_softcap: whether it can cap scores.
    """

    name: str
    forward: Callable[[FlashInputs], tuple[Tensor, Tensor]]
    backward: Callable[[FlashInputs, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    has_softcap: bool


@cache
def flash_attn() -> FlashAttention | None:
    """That of the package flash-attn from 2.7 on; dq has the same bits each time under torch.use_deterministic_algorithms."""
    try:
        import flash_attn
        from flash_attn import flash_attn_interface as flash
    except ImportError:
        return None
    if tuple(map(int, flash_attn.__version__.split(".")[:2])) < (2, 7):
        return None

    def forward(inputs: FlashInputs) -> tuple[Tensor, Tensor]:
        options = inputs.window_sizes | {"softcap": inputs.softcap or 0.0}
        arguments = *inputs[:3], *inputs.segments, 0.0, inputs.scale, True
        output_QHE, lse_HQ, *_ = flash._flash_attn_varlen_forward(*arguments, **options)
        return output_QHE, lse_HQ

    def backward(inputs: FlashInputs, grad_QHE: Tensor, output_QHE: Tensor, lse_HQ: Tensor) -> Gradients:
        query_grad_QHE = torch.empty_like(inputs.query_QHE)
        key_grad_TGE = torch.empty_like(inputs.key_TGE)
        value_grad_TGE = torch.empty_like(inputs.value_TGE)
        grads = (query_grad_QHE, key_grad_TGE, value_grad_TGE)
        options = {"dropout_p": 0.0, "softmax_scale": inputs.scale, "causal": True, "softcap": 0.0, "alibi_slopes": None}
        options |= {"window_size_left": -1, "window_size_right": -1}
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        forward_pass = *inputs[:3], output_QHE, lse_HQ
        flash._flash_attn_varlen_backward(grad_QHE, *forward_pass, *grads, *inputs.segments, **options)
        return grads

    return FlashAttention("flash-attn", forward, backward, has_softcap=True)


@cache
def torch_flash() -> FlashAttention | None:
    """That of PyTorch for CUDA; for ROCm its log-sum-exp is padded. As to bits, the same holds as for flash-attn."""
    if torch.version.cuda is None or not torch.backends.cuda.is_flash_attention_available():
        return None
    return FlashAttention("PyTorch's flash attention", _torch_forward, _torch_backward, has_softcap=False)


def _torch_forward(inputs: FlashInputs) -> tuple[Tensor, Tensor]:
    output_QHE, lse_HQ, *_ = torch.ops.aten._flash_attention_forward(
        *inputs[:3], *inputs.segments, 0.0, True, False, scale=inputs.scale, **inputs.window_sizes
    )
    return output_QHE, lse_HQ


def _torch_backward(inputs: FlashInputs, grad_QHE: Tensor, output_QHE: Tensor, lse_HQ: Tensor) -> Gradients:
    unread = lse_HQ.new_empty(2, dtype=torch.uint64)  # the state of a dropout that there is not
    return torch.ops.aten._flash_attention_backward(
        grad_QHE, *inputs[:3], output_QHE, lse_HQ, *inputs.segments, 0.0, True, unread, unread, scale=inputs.scale
    )


def available_flash() -> FlashAttention | None:
    """flash-attn's where it is installed, else PyTorch's own, else None."""
    return flash_attn() or torch_flash()


def refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why flash attention cannot run there, in one sentence; None where it can."""
    if device.type != "cuda" or torch.version.hip:
        return f"flash attention needs a CUDA device, not {'ROCm' if torch.version.hip else device.type}"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"flash attention needs compute capability {'.'.join(map(str, LEAST_CAPABILITY))}, of the A100, or later"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention computes in bf16 or fp16, not in {dtype}"
    if available_flash() is None:
        return "neither flash-attn from 2.7 on nor a PyTorch for CUDA with flash attention is installed"
    return None
