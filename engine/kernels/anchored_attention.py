"""Triton kernels of the attention of draft blocks.

Blocks of scores never leave the chip; the backward pass recomputes them.

Shapes: Q query rows, T context tokens, P rows of all blocks, H query heads, G key/value heads, R = H
/ G query heads per key/value head, E head dim. Per program: B rows, M members, K keys. A member is a
pair of a row and one of the R query heads of a group; the members of a row share their keys. R and E
are padded to powers of two. A padding member repeats an existing one and is excluded from every
result.

For one row and head, j runs over its range of context keys and its range of rows of its block. With
scores s_j = E**-0.5 q . k_j, weights w_j = exp(s_j - lse), output o = sum_j w_j v_j, the gradient do
of o, and delta = do . o:

    dv_j = sum w_j do        ds_j = w_j (do . v_j - delta)        dq = E**-0.5 sum_j ds_j k_j        dk_j = E**-0.5 sum ds_j q

A program of `_backward_rows` sums over keys. A program of `_backward_keys` sums over the rows that
see its keys; one launch computes the context's gradients and another one those of the blocks' rows.

Keys of a block of rows lie between the least begin and the greatest end of its ranges. All rows see
the keys between the greatest begin and the least end, and no mask is needed there. Rows that see a
block of keys lie between the first row that ends after its first key and the last row that begins
before its end. Rows are ordered by anchor, so that few rows between them see none of the keys.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.kernels.attention_members import (
    LOG2_E,
    NO_SCORE,
    add_gradients_of_keys,
    add_keys,
    launch_sizes,
    load_gradient,
    load_rows,
    members_of,
    store_attention,
    store_rows,
    view_of,
    weigh,
)
from engine.kernels.interface import BlockRows


@triton.jit
def _plan(begin_M, end_M, K: tl.constexpr):
    """Return how a block of rows reads its keys: (first, num_left, whole, masked, last).

    Keys in [whole, masked), a multiple of K, need no mask. Those in [first, whole), which are
    num_left blocks, and those in [masked, last) do.
    """
    first = tl.min(begin_M, 0)
    last = tl.max(end_M, 0)
    num_left = tl.cdiv(tl.max(begin_M, 0) - first, K)
    whole = first + num_left * K
    num_whole = tl.maximum(tl.min(end_M, 0) - whole, 0) // K
    return first, num_left, whole, whole + num_whole * K, last


@triton.jit
def _place(index, num_left, left, right, STEP: tl.constexpr):
    """Return the start of a block: the first `num_left` blocks follow each other from `left` on, the others from `right` on."""
    return tl.where(index < num_left, left + index * STEP, right + (index - num_left) * STEP)


@triton.jit
def _num_blocks(first, last, STEP: tl.constexpr):
    return tl.cdiv(tl.maximum(last - first, 0), STEP)


@triton.jit
def _attend(
    most_M, total_M, sum_ME, query_ME, key, value, k, last, begin_M, end_M, scale2,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys [k, k + K) to the running softmax of a block of rows. last: end of the keys that the rows see."""
    group = tl.program_id(1)
    key_K = k + tl.arange(0, K)
    is_seen_MK = (key_K[None, :] >= begin_M[:, None]) & (key_K[None, :] < end_M[:, None]) if IS_MASKED else None
    key_K = tl.minimum(key_K, last - 1)
    key_KE = load_rows(key, key_K, group, E, E_PAD)
    value_KE = load_rows(value, key_K, group, E, E_PAD)
    return add_keys(most_M, total_M, sum_ME, query_ME, key_KE, value_KE, is_seen_MK, scale2)


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    query, key, value, own_key, own_value, context_begin, context_end, own_begin, own_end, num_rows, scale, output, lse,
    R: tl.constexpr, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    # Later rows see more keys, so their programs start first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * (M // R_PAD)
    row_M, head_M, exists_M = members_of(first_row, num_rows, R, R_PAD, M)
    scale2 = scale * LOG2_E
    query_ME = load_rows(query, row_M, head_M, E, E_PAD)
    most_M = tl.full((M,), NO_SCORE, tl.float32)
    total_M = tl.zeros((M,), tl.float32)
    sum_ME = tl.zeros((M, E_PAD), tl.float32)

    begin_M = tl.load(context_begin + row_M).to(tl.int32)
    end_M = tl.load(context_end + row_M).to(tl.int32)
    first, num_left, whole, masked, last = _plan(begin_M, end_M, K)
    for k in range(whole, masked, K):
        most_M, total_M, sum_ME = _attend(
            most_M, total_M, sum_ME, query_ME, key, value, k, last, begin_M, end_M, scale2, E, E_PAD, K, False
        )
    for block in range(num_left + _num_blocks(masked, last, K)):
        k = _place(block, num_left, first, masked, K)
        most_M, total_M, sum_ME = _attend(
            most_M, total_M, sum_ME, query_ME, key, value, k, last, begin_M, end_M, scale2, E, E_PAD, K, True
        )
    begin_M = tl.load(own_begin + row_M).to(tl.int32)
    end_M = tl.load(own_end + row_M).to(tl.int32)
    last = tl.max(end_M, 0)
    for k in range(tl.min(begin_M, 0), last, K):
        most_M, total_M, sum_ME = _attend(
            most_M, total_M, sum_ME, query_ME, own_key, own_value, k, last, begin_M, end_M, scale2, E, E_PAD, K, True
        )

    store_attention(output, lse, row_M, head_M, exists_M, most_M, total_M, sum_ME, R, E, E_PAD)


@triton.jit
def _descend(
    sum_ME, query_ME, grad_ME, lse2_M, delta_M, key, value, k, last, begin_M, end_M, scale2,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add the share of the keys [k, k + K) to the gradient of the queries of a block of rows, without the scale."""
    group = tl.program_id(1)
    key_K = k + tl.arange(0, K)
    is_seen_MK = (key_K[None, :] >= begin_M[:, None]) & (key_K[None, :] < end_M[:, None]) if IS_MASKED else None
    key_K = tl.minimum(key_K, last - 1)
    key_KE = load_rows(key, key_K, group, E, E_PAD)
    value_KE = load_rows(value, key_K, group, E, E_PAD)
    _, score_grad_MK = weigh(query_ME, key_KE, grad_ME, value_KE, is_seen_MK, scale2, lse2_M[:, None], delta_M[:, None])
    return tl.dot(score_grad_MK.to(key_KE.dtype), key_KE, sum_ME, input_precision="ieee")


@triton.jit(do_not_specialize=["num_rows"])
def _backward_rows(
    query, key, value, own_key, own_value, context_begin, context_end, own_begin, own_end, num_rows, scale, output, lse,
    grad, lse2, delta, query_grad,
    R: tl.constexpr, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * (M // R_PAD)
    row_M, head_M, exists_M = members_of(first_row, num_rows, R, R_PAD, M)
    scale2 = scale * LOG2_E
    query_ME = load_rows(query, row_M, head_M, E, E_PAD)
    grad_ME, lse2_M, delta_M = load_gradient(
        output, lse, grad, lse2, delta, first_row, num_rows, row_M, head_M, exists_M, R, R_PAD, E, E_PAD, M
    )
    sum_ME = tl.zeros((M, E_PAD), tl.float32)

    begin_M = tl.load(context_begin + row_M).to(tl.int32)
    end_M = tl.load(context_end + row_M).to(tl.int32)
    first, num_left, whole, masked, last = _plan(begin_M, end_M, K)
    for k in range(whole, masked, K):
        sum_ME = _descend(
            sum_ME, query_ME, grad_ME, lse2_M, delta_M, key, value, k, last, begin_M, end_M, scale2, E, E_PAD, K, False
        )
    for block in range(num_left + _num_blocks(masked, last, K)):
        k = _place(block, num_left, first, masked, K)
        sum_ME = _descend(
            sum_ME, query_ME, grad_ME, lse2_M, delta_M, key, value, k, last, begin_M, end_M, scale2, E, E_PAD, K, True
        )
    begin_M = tl.load(own_begin + row_M).to(tl.int32)
    end_M = tl.load(own_end + row_M).to(tl.int32)
    last = tl.max(end_M, 0)
    for k in range(tl.min(begin_M, 0), last, K):
        sum_ME = _descend(
            sum_ME, query_ME, grad_ME, lse2_M, delta_M, own_key, own_value, k, last, begin_M, end_M, scale2, E, E_PAD, K, True
        )
    store_rows(query_grad, row_M, head_M, sum_ME * scale, exists_M, E, E_PAD)


@triton.jit
def _gather(
    key_sum_KE, value_sum_KE, key_KE, value_KE, key_K, query, grad, lse2, delta, begin, end, row, stop, num_rows, scale2,
    R: tl.constexpr, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, M: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add the share of a block of rows, from `row` to at most `stop`, to the gradients of keys, without the scale."""
    row_M, head_M, _ = members_of(row, stop, R, R_PAD, M)
    begin_1M = tl.load(begin + row_M).to(tl.int32)[None, :]
    end_1M = tl.load(end + row_M).to(tl.int32)[None, :]
    is_seen_KM = (key_K[:, None] >= begin_1M) & (key_K[:, None] < end_1M) if IS_MASKED else None
    return add_gradients_of_keys(
        key_sum_KE, value_sum_KE, key_KE, value_KE, query, grad, lse2, delta, row, stop, num_rows, row_M, head_M, is_seen_KM,
        scale2, R_PAD, E, E_PAD, M,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _backward_keys(
    query, key, value, begin, end, row_bounds, num_rows, num_keys, scale, grad, lse2, delta, key_grad, value_grad,
    R: tl.constexpr, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = M // R_PAD
    group = tl.program_id(1)
    scale2 = scale * LOG2_E
    key_K = tl.program_id(0) * K + tl.arange(0, K)
    exists_K = key_K < num_keys
    key_K = tl.minimum(key_K, num_keys - 1)
    key_KE = load_rows(key, key_K, group, E, E_PAD)
    value_KE = load_rows(value, key_K, group, E, E_PAD)
    key_sum_KE = tl.zeros((K, E_PAD), tl.float32)
    value_sum_KE = tl.zeros((K, E_PAD), tl.float32)
    bounds = row_bounds + tl.program_id(0)
    first = tl.load(bounds)
    whole = tl.load(bounds + tl.num_programs(0))
    masked = tl.load(bounds + 2 * tl.num_programs(0))
    last = tl.load(bounds + 3 * tl.num_programs(0))
    num_left = _num_blocks(first, whole, B)
    for block in range(num_left + _num_blocks(masked, last, B)):
        row = _place(block, num_left, first, masked, B)
        stop = tl.where(block < num_left, whole, last)
        key_sum_KE, value_sum_KE = _gather(
            key_sum_KE, value_sum_KE, key_KE, value_KE, key_K, query, grad, lse2, delta, begin, end, row, stop, num_rows,
            scale2, R, R_PAD, E, E_PAD, M, True,
        )  # fmt: skip
    for row in range(whole, masked, B):
        key_sum_KE, value_sum_KE = _gather(
            key_sum_KE, value_sum_KE, key_KE, value_KE, key_K, query, grad, lse2, delta, begin, end, row, masked, num_rows,
            scale2, R, R_PAD, E, E_PAD, M, False,
        )  # fmt: skip
    store_rows(key_grad, key_K, group, key_sum_KE * scale, exists_K, E, E_PAD)
    store_rows(value_grad, key_K, group, value_sum_KE, exists_K, E, E_PAD)


class _Segment(NamedTuple):
    """Keys of the context or of the blocks, [any, G, E], and the range of them that each row sees.

    most_2Q, least_2Q: int64, running extremes of begin and end; see `BlockRows.most_4Q`.
    """

    key_KGE: Tensor
    value_KGE: Tensor
    begin_Q: Tensor
    end_Q: Tensor
    most_2Q: Tensor
    least_2Q: Tensor

    def row_bounds(self, keys_per_block: int) -> Tensor:
        """Return the row range of each block of keys, int32 [4, N], as (first, whole, masked, last).

        Rows outside [first, last) see none of the keys; rows in [whole, masked) see all of them.
        """
        num_keys = len(self.key_KGE)
        first_N = torch.arange(0, num_keys, keys_per_block, device=self.begin_Q.device)
        stop_N = (first_N + keys_per_block).clamp_max(num_keys)
        masked_N, seen_N = torch.searchsorted(self.most_2Q, first_N.repeat(2, 1), right=True)
        last_N, whole_N = torch.searchsorted(self.least_2Q, stop_N.repeat(2, 1))
        whole_N = torch.minimum(whole_N, last_N)
        return torch.stack((seen_N, whole_N, torch.maximum(masked_N, whole_N), last_N)).int()


class _Attention(NamedTuple):
    """The arguments of one attention call, with methods that launch its kernels."""

    query_QHE: Tensor
    key_TGE: Tensor
    value_TGE: Tensor
    own_key_PGE: Tensor
    own_value_PGE: Tensor
    rows: BlockRows

    def sizes(self, kernel: str) -> dict[str, int]:
        return launch_sizes(kernel, self.query_QHE, self.key_TGE)

    @property
    def scale(self) -> float:
        return self.query_QHE.shape[2] ** -0.5

    def segments(self) -> tuple[_Segment, _Segment]:
        """Return the context and the rows of the blocks."""
        context_begin_Q, context_end_Q, own_begin_Q, own_end_Q = self.rows.bounds_4Q
        most_4Q = self.rows.most_4Q
        least_4Q = self.rows.least_4Q
        return (
            _Segment(self.key_TGE, self.value_TGE, context_begin_Q, context_end_Q, most_4Q[:2], least_4Q[:2]),
            _Segment(self.own_key_PGE, self.own_value_PGE, own_begin_Q, own_end_Q, most_4Q[2:], least_4Q[2:]),
        )

    def launch_for_rows(self, kernel: Any, name: str, *arguments: Any) -> None:
        sizes = self.sizes(name)
        num_rows = len(self.query_QHE)
        if num_rows == 0:
            return
        grid = triton.cdiv(num_rows, sizes["M"] // sizes["R_PAD"]), self.key_TGE.shape[1]
        kernel[grid](*map(view_of, self[:5]), *self.rows.bounds_4Q.unbind(), num_rows, self.scale, *arguments, **sizes)

    def launch_for_keys(self, segment: _Segment, *arguments: Any) -> None:
        sizes = self.sizes("keys")
        num_keys = len(segment.key_KGE)
        if num_keys == 0:
            return
        views = map(view_of, (self.query_QHE, segment.key_KGE, segment.value_KGE))
        index = segment.begin_Q, segment.end_Q, segment.row_bounds(sizes["K"])
        counts = len(self.query_QHE), num_keys
        grid = triton.cdiv(num_keys, sizes["K"]), self.key_TGE.shape[1]
        _backward_keys[grid](*views, *index, *counts, self.scale, *arguments, **sizes)


class _AnchoredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, rows: BlockRows) -> Tensor:
        inputs = query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE
        output_QHE = torch.empty_like(query_QHE, memory_format=torch.contiguous_format)
        lse_QH = query_QHE.new_empty(query_QHE.shape[:2], dtype=torch.float32)
        _Attention(*inputs, rows).launch_for_rows(_forward, "forward", view_of(output_QHE), lse_QH)
        ctx.rows = rows
        ctx.save_for_backward(*inputs, output_QHE, lse_QH)
        return output_QHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHE: Tensor) -> tuple[Tensor | None, ...]:
        query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, output_QHE, lse_QH = ctx.saved_tensors
        inputs = query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE
        attention = _Attention(*inputs, ctx.rows)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        query_grad, *key_grads = map(view_of, grads)
        grad = view_of(grad_QHE)
        padded_heads = attention.sizes("rows")["R_PAD"]
        lse2, delta = lse_QH.new_empty(2, attention.key_TGE.shape[1], len(grad_QHE), padded_heads)
        attention.launch_for_rows(_backward_rows, "rows", view_of(output_QHE), lse_QH, grad, lse2, delta, query_grad)
        context, own = attention.segments()
        attention.launch_for_keys(context, grad, lse2, delta, *key_grads[:2])
        attention.launch_for_keys(own, grad, lse2, delta, *key_grads[2:])
        return *grads, None


def anchored_attention(
    query_QHE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    own_key_PGE: Tensor,
    own_value_PGE: Tensor,
    rows: BlockRows,
) -> Tensor:
    """Triton implementation of `reference.anchored_attention`, without host synchronisation.

    No tensor of scores is stored. All tensors share a dtype: bf16, fp16 or fp32. E is at most 256.
    Results are deterministic: the same inputs give the same bits.
    """
    return _AnchoredAttention.apply(query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, rows)
