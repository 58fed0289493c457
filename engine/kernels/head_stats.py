"""Statistics of a target's logits in one pass: the largest logit, its token, and the log-sum-exp.

N rows, V tokens, B tokens per block. Let x be the product of a row and the head as stored in
memory, in the precision of the target, and c the soft-cap:

    y[v] = scale x[v]        z[v] = c tanh(y[v] / c) / temperature        (without a cap, z = y / temperature)
    best = max_v z[v]        argmax = the lowest v with z[v] = best        lse = log sum_v exp(z[v])

A program reads its row once. Exponentials are taken relative to the largest logit so far; when it
grows, the sums are multiplied by exp(old - new). Sums, largest logits and their tokens are kept per
lane until the end, so each block takes one reduction. If a row contains a NaN, `best` and `lse` are
NaN and `argmax` is some valid token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.interface import LogitTransform
from engine.kernels.row_loss import LEAST, maximum_and_sum

# Eight tokens per thread, so that a bf16 load takes 16 bytes. One program processes one row.
MAX_BLOCK_V = 4096
TOKENS_PER_WARP = 256

_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def tanh(x):
    """Compute tanh with a relative error below 2**-20.

    Near 1 it is rounded as PyTorch's tanh, so saturated logits tie.
    """
    size = tl.abs(x)
    shrunk = tl.exp(-2.0 * size)
    far = 1.0 - 2.0 * shrunk / (1.0 + shrunk)
    # Near 0 the difference above cancels, so use the first terms of the series.
    square = x * x
    near = size * (1.0 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    magnitude = tl.where(size < 0.15, near, far)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit(do_not_specialize=["vocab_size"])
def _stats_kernel(
    logits_NV, best_N, argmax_N, lse_N, row_stride, vocab_size, scale, soft_cap, temperature,
    HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_NV + row * row_stride
    lane_B = tl.arange(0, BLOCK_V)
    largest = tl.full([], LEAST, tl.float32)
    largest_B = tl.full([BLOCK_V], float("-inf"), tl.float32)
    token_B = tl.full([BLOCK_V], _NO_TOKEN, tl.int32)
    sum_B = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        v_B = start + lane_B
        exists_B = v_B < vocab_size
        z_B = tl.load(logits_V + v_B, mask=exists_B, other=0.0).to(tl.float32) * scale
        if HAS_CAP:
            z_B = soft_cap * tanh(z_B / soft_cap)
        z_B = tl.where(exists_B, tl.div_rn(z_B, temperature), float("-inf"))
        largest, sum_B = maximum_and_sum(largest, sum_B, z_B)
        # Of equal logits in a lane, the first token is kept.
        token_B = tl.where((z_B > largest_B) | (token_B == _NO_TOKEN) & exists_B, v_B, token_B)
        largest_B = tl.maximum(largest_B, z_B)
    total = tl.sum(sum_B, 0)
    best = tl.max(largest_B, 0)
    argmax = tl.min(tl.where(largest_B == best, token_B, _NO_TOKEN), 0)
    tl.store(best_N + row, tl.where(total == total, best, total))
    tl.store(argmax_N + row, tl.where(argmax == _NO_TOKEN, 0, argmax).to(tl.int64))
    tl.store(lse_N + row, tl.log(total) + largest)


def head_stats(logits_NV: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Triton implementation of `reference.head_stats`: one launch that reads each logit once."""
    logits_NV = logits_NV if logits_NV.stride(-1) == 1 else logits_NV.contiguous()
    num_rows, vocab_size = logits_NV.shape
    best_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
    lse_N = torch.empty_like(best_N)
    argmax_N = torch.empty(num_rows, dtype=torch.int64, device=logits_NV.device)
    if num_rows == 0:
        return best_N, argmax_N, lse_N
    block = min(MAX_BLOCK_V, triton.next_power_of_2(vocab_size))
    has_cap = transform.soft_cap is not None
    soft_cap = 1.0 if transform.soft_cap is None else transform.soft_cap
    _stats_kernel[(num_rows,)](
        logits_NV,
        best_N,
        argmax_N,
        lse_N,
        logits_NV.stride(0),
        vocab_size,
        float(transform.scale),
        float(soft_cap),
        float(transform.temperature),
        HAS_CAP=has_cap,
        BLOCK_V=block,
        num_warps=max(1, block // TOKENS_PER_WARP),
    )
    return best_N, argmax_N, lse_N
