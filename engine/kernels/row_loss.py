"""Triton kernel of the vocabulary loss of one chunk, in one launch.

It computes statistics of every row and overwrites the row's logits with their gradient.

Shapes: r rows of the chunk, n slots, U draft vocabulary, B tokens per block. For one row, let z be
the draft's logits, t the target's logits of the row's slot over the draft vocabulary, and `lse` the
log-sum-exp of the target's logits over its full vocabulary:

    q = softmax(z)      p = softmax(t)      p_full[v] = exp(t[v] - lse)
    cross_entropy = -sum_v p[v] log q[v] = log sum_v exp(z[v] - max z) + sum_v p[v] (max z - z[v])
    acceptance    = sum_v min(p_full[v], q[v])

The second form of the cross-entropy adds numbers of one sign only, so saturated logits cause no
cancellation. The loss of a row is

    w0 cross_entropy - w1 log max(acceptance, TINY) + w2 (1 - acceptance)

With dq[v]/dz[u] = q[v] ([u = v] - q[u]), and d min(p_full[v], q[v]) / dq[v] = [q[v] < p_full[v]], zero at a tie:

    below[v]            = q[v] [q[v] < p_full[v]]
    d cross_entropy /dz = q - p                             since p sums to 1
    d acceptance /dz    = below - q sum_v below[v]
    pull                = w1 / acceptance [acceptance > TINY] + w2
    d loss /dz          = w0 (q - p) - pull (below - q sum_v below[v])

A program reads its row two or three times and computes in fp32. The first pass finds the maxima and
sums of both softmaxes. The second computes the statistics and the gradient of the cross-entropy. A
third pass is needed only for gradients that depend on `acceptance` and the sum of `below`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.interface import LossChunk
from engine.kernels.reference import TINY

# Many warps per row keep few rows in flight, so that a row stays in L2 between two passes. Eight
# tokens per thread: a bf16 load takes 16 bytes, and ptxas needs 64 registers (sm_90). Two rows then
# share a multiprocessor, and one computes while the other waits.
MAX_BLOCK_U = 4096
TOKENS_PER_WARP = 256

_TINY = tl.constexpr(TINY)
# Maxima start here instead of at -inf, because a block of only -inf would give -inf - -inf = NaN.
LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _load(logits_U, v_B, U: tl.constexpr):
    return tl.load(logits_U + v_B, mask=v_B < U, other=float("-inf")).to(tl.float32)


@triton.jit
def maximum_and_sum(max_so_far, sum_B, logits_B):
    """Update the running maximum and the sums of exp(logit - maximum) with one block of logits.

    The sums are kept per lane and reduced at the end.
    """
    maximum = tl.maximum(max_so_far, tl.max(logits_B, 0))
    return maximum, sum_B * tl.exp(max_so_far - maximum) + tl.exp(logits_B - maximum)


@triton.jit
def _normalise(z_U, t_U, U: tl.constexpr, BLOCK_U: tl.constexpr):
    """Return max and sum of exp(logit - max), of the draft's and then of the target's logits."""
    max_z = tl.full([], LEAST, tl.float32)
    max_t = tl.full([], LEAST, tl.float32)
    sum_z_B = tl.zeros([BLOCK_U], tl.float32)
    sum_t_B = tl.zeros([BLOCK_U], tl.float32)
    for start in range(0, U, BLOCK_U):
        v_B = start + tl.arange(0, BLOCK_U)
        max_z, sum_z_B = maximum_and_sum(max_z, sum_z_B, _load(z_U, v_B, U))
        max_t, sum_t_B = maximum_and_sum(max_t, sum_t_B, _load(t_U, v_B, U))
    return max_z, tl.sum(sum_z_B, 0), max_t, tl.sum(sum_t_B, 0)


@triton.jit
def _compare(
    z_U, t_U, max_z, q_scale, max_t, p_scale, p_full_scale, weight,
    U: tl.constexpr, BLOCK_U: tl.constexpr, WITH_GRADIENTS: tl.constexpr,
):  # fmt: skip
    """Compute sum_v p[v] (max z - z[v]), sum_v min(p_full[v], q[v]) and sum_v below[v].

    With gradients, also overwrite z with weight * (q - p).
    """
    gap_B = tl.zeros([BLOCK_U], tl.float32)
    acceptance_B = tl.zeros([BLOCK_U], tl.float32)
    below_B = tl.zeros([BLOCK_U], tl.float32)
    for start in range(0, U, BLOCK_U):
        v_B = start + tl.arange(0, BLOCK_U)
        z_B = _load(z_U, v_B, U)
        q_B = tl.exp(z_B - max_z) * q_scale
        exp_t_B = tl.exp(_load(t_U, v_B, U) - max_t)
        p_full_B = exp_t_B * p_full_scale
        gap_B += exp_t_B * tl.where(v_B < U, max_z - z_B, 0.0)  # past the end, 0 * inf would be NaN
        acceptance_B += tl.minimum(q_B, p_full_B, propagate_nan=tl.PropagateNan.ALL)
        below_B += tl.where(q_B < p_full_B, q_B, 0.0)
        if WITH_GRADIENTS:
            tl.store(z_U + v_B, weight * (q_B - exp_t_B * p_scale), mask=v_B < U)
    return tl.sum(gap_B, 0) * p_scale, tl.sum(acceptance_B, 0), tl.sum(below_B, 0)


@triton.jit
def _store_gradient(
    z_U, t_U, max_z, q_scale, max_t, p_scale, p_full_scale, weight, pull, below_sum, U: tl.constexpr, BLOCK_U: tl.constexpr
):
    """Overwrite z with weight * (q - p) - pull * (below - q * below_sum)."""
    for start in range(0, U, BLOCK_U):
        v_B = start + tl.arange(0, BLOCK_U)
        q_B = tl.exp(_load(z_U, v_B, U) - max_z) * q_scale
        exp_t_B = tl.exp(_load(t_U, v_B, U) - max_t)
        below_B = tl.where(q_B < exp_t_B * p_full_scale, q_B, 0.0)
        gradient_B = weight * (q_B - exp_t_B * p_scale) - pull * (below_B - q_B * below_sum)
        tl.store(z_U + v_B, gradient_B, mask=v_B < U)


@triton.jit
def _silence(z_U, stats_4, stats_stride, U: tl.constexpr, BLOCK_U: tl.constexpr, WITH_GRADIENTS: tl.constexpr):
    for stat in tl.static_range(4):
        tl.store(stats_4 + stat * stats_stride, 0.0)
    if WITH_GRADIENTS:
        for start in range(0, U, BLOCK_U):
            v_B = start + tl.arange(0, BLOCK_U)
            tl.store(z_U + v_B, tl.zeros([BLOCK_U], tl.float32), mask=v_B < U)


@triton.jit(do_not_specialize=["num_rows", "rows_apart", "rows_together"])
def _row_kernel(
    logits_rU, target_nU, slot_r, lse_n, draft_id_n, weight_3r, stats_4r,
    logits_stride, target_stride, num_rows, rows_apart, rows_together,
    U: tl.constexpr, BLOCK_U: tl.constexpr, MIXES: tl.constexpr, WITH_GRADIENTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program % rows_together) * rows_apart + program // rows_together
    if row >= num_rows:
        return
    row = row.to(tl.int64)
    z_U = logits_rU + row * logits_stride
    weight_3 = weight_3r + row
    stats_4 = stats_4r + row
    slot = tl.load(slot_r + row)
    if slot < 0:
        _silence(z_U, stats_4, num_rows, U, BLOCK_U, WITH_GRADIENTS)
        return
    t_U = target_nU + slot * target_stride
    # This has to be read before z is overwritten.
    z_of_likeliest = tl.load(z_U + tl.load(draft_id_n + slot)).to(tl.float32)

    max_z, sum_z, max_t, sum_t = _normalise(z_U, t_U, U, BLOCK_U)
    q_scale = 1.0 / sum_z
    p_scale = 1.0 / sum_t
    p_full_scale = tl.exp(max_t - tl.load(lse_n + slot))
    weight = tl.load(weight_3)
    gap, acceptance, below_sum = _compare(
        z_U, t_U, max_z, q_scale, max_t, p_scale, p_full_scale, weight, U, BLOCK_U, WITH_GRADIENTS and not MIXES
    )
    acceptance_or_tiny = tl.maximum(acceptance, _TINY, propagate_nan=tl.PropagateNan.ALL)
    tl.store(stats_4, tl.log(sum_z) + gap)
    tl.store(stats_4 + num_rows, -tl.log(acceptance_or_tiny))
    tl.store(stats_4 + 2 * num_rows, acceptance)
    tl.store(stats_4 + 3 * num_rows, (z_of_likeliest >= max_z).to(tl.float32))
    if WITH_GRADIENTS and MIXES:
        pull_of_log = tl.where(acceptance > _TINY, tl.load(weight_3 + num_rows) / acceptance_or_tiny, 0.0)
        pull = pull_of_log + tl.load(weight_3 + 2 * num_rows)
        _store_gradient(z_U, t_U, max_z, q_scale, max_t, p_scale, p_full_scale, weight, pull, below_sum, U, BLOCK_U)


def row_loss(chunk: LossChunk, with_gradients: bool) -> Tensor:
    """Triton implementation of `vocab_loss.row_loss`, in one launch."""
    logits_rU = chunk.logits_rU
    target_nU = chunk.target_nU
    weight_3r = chunk.weight_xr
    assert logits_rU.stride(1) == 1 == target_nU.stride(1), "a row's logits must be contiguous"
    assert weight_3r.is_contiguous() and weight_3r.dtype == chunk.lse_n.dtype == torch.float32
    num_rows, vocab = logits_rU.shape
    stats_4r = torch.empty(4, num_rows, device=logits_rU.device)
    if num_rows == 0:
        return stats_4r
    # Rows are ordered by step, then by slot, so the rows of a slot are n apart if none is missing.
    # Consecutive programs process the rows of a slot, so that the slot's target is read from memory
    # once. With missing rows this holds only approximately, which affects speed alone.
    rows_apart = max(1, min(target_nU.shape[0], num_rows))
    rows_together = triton.cdiv(num_rows, rows_apart)
    block = min(MAX_BLOCK_U, triton.next_power_of_2(vocab))
    _row_kernel[(rows_apart * rows_together,)](
        logits_rU, target_nU, chunk.slot_r, chunk.lse_n, chunk.draft_id_n, weight_3r, stats_4r,
        logits_rU.stride(0), target_nU.stride(0), num_rows, rows_apart, rows_together,
        U=vocab, BLOCK_U=block, MIXES=chunk.mixes, WITH_GRADIENTS=with_gradients,
        num_warps=max(1, block // TOKENS_PER_WARP),
    )  # fmt: skip
    return stats_4r
