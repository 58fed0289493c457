"""Flash attention within segments of packed rows, by flash-attn or PyTorch.

It computes the draft's attention to the prefix and the target's attention within documents.

The following was checked in the sources of flash-attn 2.7.0 and 2.8.3 and of PyTorch's copy of it:

- A causal mask is aligned to the bottom right corner of a segment (flash-attn since 2.1).
- A window of `left` keys does not count the query's own key.
- Segments without queries get zero gradients.
- The log-sum-exp is the natural one, of the scores as they enter the softmax, with shape [H, Q]
  (flash-attn since 2.7; PyTorch for CUDA).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM, HEAD_DIM_GRANULE, LEAST_CAPABILITY = 256, 8, (8, 0)  # limits of flash attention 2


Gradients = tuple[Tensor, Tensor, Tensor]  # of query, key and value


class FlashInputs(NamedTuple):
    """Inputs of flash attention. All tensors are contiguous in their last dimension.

    cu_queries, cu_keys: int32, starts of the segments, with the total at the end.
    scaling: factor of the scores; None = E**-0.5.
    window: maximum number of keys that a query sees, including its own; None = all.
    softcap: cap of the scores by tanh; None = no cap.
    longest: tokens of the longest segment; None = not known on the host.
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
        """Segment starts of queries and keys, and the maximum number of each in a segment.

        If only the device knows the lengths, the maxima are upper bounds. The maximum number of
        queries is at least 2: given 1, flash attention assumes that every segment has one query.
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

    forward: inputs -> output [Q, H, E] and log-sum-exp, fp32 [H, Q], both contiguous.
    backward: inputs (without window and cap), gradient of the output, output, log-sum-exp ->
        gradients of queries, keys and values. The output and log-sum-exp may belong to a softmax
        over additional keys.
    has_softcap: whether the implementation can cap scores.
    """

    name: str
    forward: Callable[[FlashInputs], tuple[Tensor, Tensor]]
    backward: Callable[[FlashInputs, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    has_softcap: bool


@cache
def flash_attn() -> FlashAttention | None:
    """Return the attention of flash-attn, or None if version 2.7 or later is not installed.

    dq is deterministic under `torch.use_deterministic_algorithms`.
    """
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
    """Return PyTorch's flash attention for CUDA, or None if it is not available.

    The ROCm version is not used, because it pads the log-sum-exp. dq is deterministic under
    `torch.use_deterministic_algorithms`.
    """
    if torch.version.cuda is None or not torch.backends.cuda.is_flash_attention_available():
        return None
    return FlashAttention("PyTorch's flash attention", _torch_forward, _torch_backward, has_softcap=False)


def _torch_forward(inputs: FlashInputs) -> tuple[Tensor, Tensor]:
    output_QHE, lse_HQ, *_ = torch.ops.aten._flash_attention_forward(
        *inputs[:3], *inputs.segments, 0.0, True, False, scale=inputs.scale, **inputs.window_sizes
    )
    return output_QHE, lse_HQ


def _torch_backward(inputs: FlashInputs, grad_QHE: Tensor, output_QHE: Tensor, lse_HQ: Tensor) -> Gradients:
    unread = lse_HQ.new_empty(2, dtype=torch.uint64)  # dropout state; dropout is off
    return torch.ops.aten._flash_attention_backward(
        grad_QHE, *inputs[:3], output_QHE, lse_HQ, *inputs.segments, 0.0, True, unread, unread, scale=inputs.scale
    )


def available_flash() -> FlashAttention | None:
    """Return flash-attn's attention if installed, else PyTorch's, else None."""
    return flash_attn() or torch_flash()


def refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why flash attention cannot run on the device, in one sentence, or None if it can."""
    if device.type != "cuda" or torch.version.hip:
        return f"flash attention needs a CUDA device, not {'ROCm' if torch.version.hip else device.type}"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"flash attention needs compute capability {'.'.join(map(str, LEAST_CAPABILITY))} (A100) or later"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention computes in bf16 or fp16, not in {dtype}"
    if available_flash() is None:
        return "neither flash-attn 2.7 or later nor a PyTorch for CUDA with flash attention is installed"
    return None
