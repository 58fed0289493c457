"""Triton kernel of the loss of one chunk of rows against tokens and target distributions, in one launch.

It computes statistics of every row and overwrites the row's logits with their gradient.

Shapes: r rows of the chunk, n slots, V vocabulary, B tokens per block. For one row, let x be its
product with the head, b its bias, c the soft cap, and t the target's logits of its slot:

    z = c tanh(scale x / c) / temperature + b        (without a cap, z = scale x / temperature + b)
    q = softmax(z)      p = softmax(t)      s = sign(q - p)
    cross_entropy = log sum_v exp(z[v]) - z[label]
    kl = sum_v p[v] (log p[v] - log q[v])      total_variation = sum_v |q[v] - p[v]| / 2

With weights w of these parts, where onehot is that of the label:

    d loss /db = w0 (q - onehot) + w1 (q - p) + w2 q (s - sum_v q[v] s[v]) / 2
    d loss /dz'= d loss /db (1 - tanh(scale x / c)**2)

z' is the logit before the soft cap, up to the constant factor scale / temperature, which the caller
applies. Without a cap both gradients are the same.

A program reads its row two or three times and computes in fp32. The first pass finds the maxima and
sums of both softmaxes, and the logits of the label and of the target's most likely token. The second
one compares the distributions. The gradient of the total variation needs sum_v q[v] s[v] and thus a
third pass; other gradients are formed in the second one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.head_stats import tanh
from engine.kernels.interface import TokenChunk
from engine.kernels.row_loss import LEAST, maximum_and_sum
from engine.kernels.token_loss import NUM_STATS

# As in row_loss.py: few rows are in flight, so that a row stays in L2 between two passes, and a
# thread loads eight tokens, which are 16 bytes in bf16.
MAX_BLOCK_V = 4096
TOKENS_PER_WARP = 256


@triton.jit
def _draft_logits(
    x_V, bias_V, v_B, inner, outer, V: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_CAP: tl.constexpr
):  # fmt: skip
    """Return a block of logits, minus infinity past the end, and the derivative of the soft cap."""
    exists_B = v_B < V
    z_B = tl.load(x_V + v_B, mask=exists_B, other=0.0).to(tl.float32)
    slope_B = tl.full(v_B.shape, 1.0, tl.float32)
    if HAS_FACTOR:
        z_B = z_B * inner
    if HAS_CAP:
        bent_B = tanh(z_B)
        slope_B = 1.0 - bent_B * bent_B
        z_B = bent_B * outer
    if bias_V is not None:
        z_B += tl.load(bias_V + v_B, mask=exists_B, other=0.0).to(tl.float32)
    return tl.where(exists_B, z_B, float("-inf")), slope_B


@triton.jit
def _target_logits(target_V, v_B, V: tl.constexpr):
    return tl.load(target_V + v_B, mask=v_B < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _sign(x_B):
    return (x_B > 0).to(tl.float32) - (x_B < 0).to(tl.float32)


@triton.jit
def _store_gradient(
    x_V, bias_V, v_B, gradient_B, slope_B, label, cross_entropy, V: tl.constexpr, HAS_CAP: tl.constexpr
):  # fmt: skip
    """Complete the gradient by the term of the label, and store it in place of the logits and of the bias."""
    gradient_B = tl.where(v_B == label, gradient_B - cross_entropy, gradient_B)
    exists_B = v_B < V
    if HAS_CAP:
        if bias_V is not None:
            tl.store(bias_V + v_B, gradient_B, mask=exists_B)
        gradient_B = gradient_B * slope_B
    tl.store(x_V + v_B, gradient_B, mask=exists_B)


@triton.jit(do_not_specialize=["num_rows"])
def _row_kernel(
    logits_rV, bias_rV, label_r, target_nV, slot_r, token_n, stats_4r, logits_stride, bias_stride, target_stride, num_rows,
    inner, outer, cross_entropy, kl, total_variation,
    V: tl.constexpr, BLOCK_V: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_CAP: tl.constexpr, NEEDS_MEAN: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_V = logits_rV + row * logits_stride
    bias_V = None
    if bias_rV is not None:
        bias_V = bias_rV + row * bias_stride
    stats_4 = stats_4r + row
    label = tl.load(label_r + row).to(tl.int32)
    likeliest = label
    HAS_TARGET: tl.constexpr = target_nV is not None
    if HAS_TARGET:
        slot = tl.load(slot_r + row).to(tl.int64)
        target_V = target_nV + slot * target_stride
        likeliest = tl.load(token_n + slot).to(tl.int32)

    max_z = tl.full([], LEAST, tl.float32)
    max_t = tl.full([], LEAST, tl.float32)
    sum_z_B = tl.zeros([BLOCK_V], tl.float32)
    sum_t_B = tl.zeros([BLOCK_V], tl.float32)
    # Logits of two tokens. Taken from the blocks, they equal the maximum to the last bit.
    z_label_B = tl.zeros([BLOCK_V], tl.float32)
    z_likeliest_B = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        v_B = start + tl.arange(0, BLOCK_V)
        z_B, _ = _draft_logits(x_V, bias_V, v_B, inner, outer, V, HAS_FACTOR, HAS_CAP)
        max_z, sum_z_B = maximum_and_sum(max_z, sum_z_B, z_B)
        z_label_B = tl.where(v_B == label, z_B, z_label_B)
        if HAS_TARGET:
            z_likeliest_B = tl.where(v_B == likeliest, z_B, z_likeliest_B)
            max_t, sum_t_B = maximum_and_sum(max_t, sum_t_B, _target_logits(target_V, v_B, V))
    sum_z = tl.sum(sum_z_B, 0)
    z_label = tl.sum(z_label_B, 0)
    z_likeliest = tl.sum(z_likeliest_B, 0) if HAS_TARGET else z_label
    tl.store(stats_4, tl.log(sum_z) + (max_z - z_label))
    tl.store(stats_4 + num_rows, (z_likeliest >= max_z).to(tl.float32))

    q_scale = 1.0 / sum_z
    p_scale = 0.0
    mean = 0.0
    if HAS_TARGET:
        sum_t = tl.sum(sum_t_B, 0)
        p_scale = 1.0 / sum_t
        log_ratio = tl.log(sum_z) - tl.log(sum_t)
        kl_B = tl.zeros([BLOCK_V], tl.float32)
        distance_B = tl.zeros([BLOCK_V], tl.float32)
        mean_B = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, V, BLOCK_V):
            v_B = start + tl.arange(0, BLOCK_V)
            z_B, slope_B = _draft_logits(x_V, bias_V, v_B, inner, outer, V, HAS_FACTOR, HAS_CAP)
            t_B = _target_logits(target_V, v_B, V)
            q_B = tl.exp(z_B - max_z) * q_scale
            p_B = tl.exp(t_B - max_t) * p_scale
            # Where p is 0, also past the end, the difference of the logarithms may be NaN.
            kl_B += tl.where(p_B == 0, 0.0, p_B * ((t_B - max_t) - (z_B - max_z) + log_ratio))
            distance_B += tl.abs(q_B - p_B)
            mean_B += q_B * _sign(q_B - p_B)
            if WITH_GRADIENTS and not NEEDS_MEAN:
                gradient_B = cross_entropy * q_B + kl * (q_B - p_B)
                _store_gradient(x_V, bias_V, v_B, gradient_B, slope_B, label, cross_entropy, V, HAS_CAP)
        mean = tl.sum(mean_B, 0)
        tl.store(stats_4 + 2 * num_rows, tl.sum(kl_B, 0))
        tl.store(stats_4 + 3 * num_rows, tl.sum(distance_B, 0) / 2)

    if WITH_GRADIENTS and (NEEDS_MEAN or not HAS_TARGET):
        for start in range(0, V, BLOCK_V):
            v_B = start + tl.arange(0, BLOCK_V)
            z_B, slope_B = _draft_logits(x_V, bias_V, v_B, inner, outer, V, HAS_FACTOR, HAS_CAP)
            q_B = tl.exp(z_B - max_z) * q_scale
            gradient_B = cross_entropy * q_B
            if HAS_TARGET:
                p_B = tl.exp(_target_logits(target_V, v_B, V) - max_t) * p_scale
                gradient_B += kl * (q_B - p_B) + total_variation / 2 * q_B * (_sign(q_B - p_B) - mean)
            _store_gradient(x_V, bias_V, v_B, gradient_B, slope_B, label, cross_entropy, V, HAS_CAP)


def token_row_loss(chunk: TokenChunk, with_gradients: bool) -> Tensor:
    """Triton implementation of `token_loss.token_row_loss`, in one launch."""
    logits_rV = chunk.logits_rV
    bias_rV = chunk.bias_rV
    targets = chunk.targets
    terms = chunk.terms
    num_rows, vocab_size = logits_rV.shape
    stats_4r = torch.zeros(NUM_STATS, num_rows, device=logits_rV.device)
    if num_rows == 0:
        return stats_4r
    assert logits_rV.stride(1) == 1, "a row's logits must be contiguous"
    assert bias_rV is None or bias_rV.stride(1) == 1, "a row's bias must be contiguous"
    target_nV = slot_r = token_n = None
    if targets is not None:
        target_nV = targets.logits_nV
        assert target_nV.stride(1) == 1, "the target's logits of a slot must be contiguous"
        slot_r = targets.slot_r
        token_n = targets.token_n
    transform = chunk.transform
    inner = transform.scale / transform.temperature
    outer = 1.0
    if transform.soft_cap is not None:
        inner = transform.scale / transform.soft_cap
        outer = transform.soft_cap / transform.temperature
    block = min(MAX_BLOCK_V, triton.next_power_of_2(vocab_size))
    _row_kernel[(num_rows,)](
        logits_rV, bias_rV, chunk.label_r, target_nV, slot_r, token_n, stats_4r,
        logits_rV.stride(0), 0 if bias_rV is None else bias_rV.stride(0), 0 if target_nV is None else target_nV.stride(0),
        num_rows, float(inner), float(outer), float(terms.cross_entropy), float(terms.kl), float(terms.total_variation),
        V=vocab_size, BLOCK_V=block, HAS_FACTOR=inner != 1.0, HAS_CAP=transform.soft_cap is not None,
        NEEDS_MEAN=targets is not None and terms.total_variation != 0, WITH_GRADIENTS=with_gradients,
        num_warps=max(1, block // TOKENS_PER_WARP),
    )  # fmt: skip
    return stats_4r
