"""Triton kernels of ancestor attention.

Blocks of scores never leave the chip; the backward pass recomputes them.

Shapes: Q query rows, T packed tokens, H query heads, G key/value heads, R = H / G query heads per
key/value head, E head dim, A ancestors. Per program: B rows, M members, K keys. A member is a pair
of a row and one of the R query heads of a group; the members of a row share their keys. R and E are
padded to powers of two. A padding member repeats an existing one and is excluded from every result.

For one row and head, j runs over the keys of the prefix and of the ancestors. With scores
s_j = E**-0.5 q . k_j, weights w_j = exp(s_j - lse), output o = sum_j w_j v_j, the gradient do of o,
and delta = do . o:

    dv_j = sum w_j do        ds_j = w_j (do . v_j - delta)        dq = E**-0.5 sum_j ds_j k_j        dk_j = E**-0.5 sum ds_j q

A program of `_backward_rows` sums over keys; a program of `_backward_keys` sums over the rows that
see its keys. In a chain no two rows share an ancestor, so the program of a row writes the gradients
of the row's ancestors directly. In a tree it writes them per row, and PyTorch then adds the rows in
a fixed order.

Rows ascend by position. The keys of a block of rows therefore run from the document start of the
first row to the position of the last row. If all rows of the block belong to one document, all of
them see every key up to the position of the first row, and no mask is needed there.
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
    add_key,
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
from engine.kernels.interface import AttentionRows
from engine.kernels.row_index import add_rows


@triton.jit
def _keys_of_rows(position, start, first, num_rows, B: tl.constexpr, K: tl.constexpr):
    """Return the key range of a block of rows as (begin, masked, end).

    All rows see every key in [begin, masked), which is a multiple of K keys. Keys in [masked, end)
    need a mask.
    """
    last = tl.minimum(first + B, num_rows) - 1
    begin = tl.load(start + first)
    is_one_document = begin == tl.load(start + last)
    num_whole = tl.where(is_one_document, (tl.load(position + first) + 1 - begin) // K, 0)
    return begin.to(tl.int32), (begin + num_whole * K).to(tl.int32), (tl.load(position + last) + 1).to(tl.int32)


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    query, key, value, extra_keys, extra_values, ancestors, position, start, num_rows, scale, output, lse,
    A: tl.constexpr, IS_TREE: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = M // R_PAD
    # Later rows see more keys, so their programs start first.
    first, group = (tl.num_programs(0) - 1 - tl.program_id(0)) * B, tl.program_id(1)
    row_M, head_M, exists_M = members_of(first, num_rows, R, R_PAD, M)
    scale2 = scale * LOG2_E
    query_ME = load_rows(query, row_M, head_M, E, E_PAD)
    most_M = tl.full((M,), NO_SCORE, tl.float32)
    total_M = tl.zeros((M,), tl.float32)
    sum_ME = tl.zeros((M, E_PAD), tl.float32)
    for a in tl.static_range(A):
        ancestor_M = tl.load(ancestors[a] + row_M)
        key_ME = load_rows(extra_keys[a], tl.maximum(ancestor_M, 0), group, E, E_PAD).to(tl.float32)
        score_M = tl.sum(query_ME.to(tl.float32) * key_ME, 1) * scale2
        score_M = tl.where(ancestor_M >= 0, score_M, float("-inf")) if IS_TREE else score_M
        value_ME = load_rows(extra_values[a], tl.maximum(ancestor_M, 0), group, E, E_PAD).to(tl.float32)
        most_M, total_M, sum_ME = add_key(most_M, total_M, sum_ME, score_M, value_ME)

    begin, masked, end = _keys_of_rows(position, start, first, num_rows, B, K)
    position_M = tl.load(position + row_M).to(tl.int32)
    start_M = tl.load(start + row_M).to(tl.int32)
    for IS_MASKED in tl.static_range(2):
        for k in range(masked if IS_MASKED else begin, end if IS_MASKED else masked, K):
            key_K = k + tl.arange(0, K)
            is_seen_MK = (key_K[None, :] >= start_M[:, None]) & (key_K[None, :] <= position_M[:, None]) if IS_MASKED else None
            key_K = tl.minimum(key_K, end - 1)
            key_KE = load_rows(key, key_K, group, E, E_PAD)
            value_KE = load_rows(value, key_K, group, E, E_PAD)
            most_M, total_M, sum_ME = add_keys(most_M, total_M, sum_ME, query_ME, key_KE, value_KE, is_seen_MK, scale2)

    store_attention(output, lse, row_M, head_M, exists_M, most_M, total_M, sum_ME, R, E, E_PAD)


@triton.jit
def _store_own(view, row_B, x_ME, num_exist, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr):
    """Sum over the query heads of a group and store the result for each row's ancestor."""
    B: tl.constexpr = x_ME.shape[0] // R_PAD
    x_BE = tl.sum(tl.reshape(x_ME, (B, R_PAD, E_PAD)), 1)
    store_rows(view, row_B, tl.program_id(1), x_BE, tl.arange(0, B) < num_exist, E, E_PAD)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_rows(
    query, key, value, extra_keys, extra_values, ancestors, position, start, num_rows, scale, output, lse,
    grad, lse2, delta, query_grad, extra_key_grads, extra_value_grads,
    A: tl.constexpr, IS_TREE: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = M // R_PAD
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * B
    group = tl.program_id(1)
    row_M, head_M, exists_M = members_of(first, num_rows, R, R_PAD, M)
    row_B = tl.minimum(first + tl.arange(0, B), num_rows - 1)
    scale2 = scale * LOG2_E
    query_ME = load_rows(query, row_M, head_M, E, E_PAD)
    grad_ME, lse2_M, delta_M = load_gradient(
        output, lse, grad, lse2, delta, first, num_rows, row_M, head_M, exists_M, R, R_PAD, E, E_PAD, M
    )
    sum_ME = tl.zeros((M, E_PAD), tl.float32)
    for a in tl.static_range(A):
        ancestor_M = tl.load(ancestors[a] + row_M)
        key_ME = load_rows(extra_keys[a], tl.maximum(ancestor_M, 0), group, E, E_PAD).to(tl.float32)
        score_M = tl.sum(query_ME.to(tl.float32) * key_ME, 1) * scale2
        score_M = tl.where(ancestor_M >= 0, score_M, float("-inf")) if IS_TREE else score_M
        weight_M = tl.exp2(score_M - lse2_M)
        value_ME = load_rows(extra_values[a], tl.maximum(ancestor_M, 0), group, E, E_PAD).to(tl.float32)
        score_grad_M = weight_M * (tl.sum(grad_ME.to(tl.float32) * value_ME, 1) - delta_M)
        sum_ME += score_grad_M[:, None] * key_ME
        target_B = row_B if IS_TREE else tl.load(ancestors[a] + row_B)
        score_grad_M1 = (score_grad_M * scale)[:, None]
        weight_M1 = weight_M[:, None]
        num_left = num_rows - first
        _store_own(extra_key_grads[a], target_B, score_grad_M1 * query_ME.to(tl.float32), num_left, R_PAD, E, E_PAD)
        _store_own(extra_value_grads[a], target_B, weight_M1 * grad_ME.to(tl.float32), num_left, R_PAD, E, E_PAD)

    lse2_M1 = lse2_M[:, None]
    delta_M1 = delta_M[:, None]
    begin, masked, end = _keys_of_rows(position, start, first, num_rows, B, K)
    position_M = tl.load(position + row_M).to(tl.int32)
    start_M = tl.load(start + row_M).to(tl.int32)
    for IS_MASKED in tl.static_range(2):
        for k in range(masked if IS_MASKED else begin, end if IS_MASKED else masked, K):
            key_K = k + tl.arange(0, K)
            is_seen_MK = (key_K[None, :] >= start_M[:, None]) & (key_K[None, :] <= position_M[:, None]) if IS_MASKED else None
            key_K = tl.minimum(key_K, end - 1)
            key_KE = load_rows(key, key_K, group, E, E_PAD)
            value_KE = load_rows(value, key_K, group, E, E_PAD)
            _, score_grad_MK = weigh(query_ME, key_KE, grad_ME, value_KE, is_seen_MK, scale2, lse2_M1, delta_M1)
            sum_ME = tl.dot(score_grad_MK.to(key_KE.dtype), key_KE, sum_ME, input_precision="ieee")
    store_rows(query_grad, row_M, head_M, sum_ME * scale, exists_M, E, E_PAD)


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _backward_keys(
    query, key, value, position, start, row_bounds, num_rows, num_keys, scale, grad, lse2, delta, key_grad, value_grad,
    R: tl.constexpr, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = M // R_PAD
    block = tl.program_id(0)
    num_blocks = tl.num_programs(0)
    group = tl.program_id(1)
    scale2 = scale * LOG2_E
    key_K = block * K + tl.arange(0, K)
    exists_K = key_K < num_keys
    key_K = tl.minimum(key_K, num_keys - 1)
    key_KE = load_rows(key, key_K, group, E, E_PAD)
    value_KE = load_rows(value, key_K, group, E, E_PAD)
    key_sum_KE = tl.zeros((K, E_PAD), tl.float32)
    value_sum_KE = tl.zeros((K, E_PAD), tl.float32)
    begin = tl.load(row_bounds + block)
    whole = tl.load(row_bounds + num_blocks + block)
    end = tl.load(row_bounds + 2 * num_blocks + block)
    for IS_MASKED in tl.static_range(2):
        stop = whole if IS_MASKED else end
        for row in range(begin if IS_MASKED else whole, stop, B):
            row_M, head_M, _ = members_of(row, stop, R, R_PAD, M)
            position_M = tl.load(position + row_M).to(tl.int32)
            start_M = tl.load(start + row_M).to(tl.int32)
            is_seen_KM = (key_K[:, None] >= start_M[None, :]) & (key_K[:, None] <= position_M[None, :]) if IS_MASKED else None
            key_sum_KE, value_sum_KE = add_gradients_of_keys(
                key_sum_KE, value_sum_KE, key_KE, value_KE, query, grad, lse2, delta, row, stop, num_rows, row_M, head_M,
                is_seen_KM, scale2, R_PAD, E, E_PAD, M,
            )  # fmt: skip
    store_rows(key_grad, key_K, group, key_sum_KE * scale, exists_K, E, E_PAD)
    store_rows(value_grad, key_K, group, value_sum_KE, exists_K, E, E_PAD)


class _Attention(NamedTuple):
    """The arguments of one attention call, with methods that launch its kernels."""

    query_QHE: Tensor
    key_TGE: Tensor
    value_TGE: Tensor
    extras: tuple[Tensor, ...]
    rows: AttentionRows

    def sizes(self, kernel: str) -> dict[str, int]:
        return launch_sizes(kernel, self.query_QHE, self.key_TGE)

    def launch_for_rows(self, kernel: Any, name: str, *arguments: Any) -> None:
        rows, sizes, (num_rows, _, head_dim) = self.rows, self.sizes(name), self.query_QHE.shape
        num_extra = len(rows.ancestors)
        views = map(view_of, self[:3])
        extras = tuple(map(view_of, self.extras))
        index = tuple(x.contiguous() for x in rows.ancestors), rows.position_Q.contiguous(), rows.start_Q
        arguments = *views, extras[:num_extra], extras[num_extra:], *index, num_rows, head_dim**-0.5, *arguments
        if num_rows:
            grid = triton.cdiv(num_rows, sizes["M"] // sizes["R_PAD"]), self.key_TGE.shape[1]
            kernel[grid](*arguments, A=num_extra, IS_TREE=rows.is_tree, **sizes)

    def launch_for_keys(self, *arguments: Any) -> None:
        sizes = self.sizes("keys")
        num_rows = len(self.query_QHE)
        num_keys = len(self.key_TGE)
        index = self.rows.position_Q.contiguous(), self.rows.start_Q, self.row_bounds(sizes["K"])
        arguments = *map(view_of, self[:3]), *index, num_rows, num_keys, self.query_QHE.shape[2] ** -0.5, *arguments
        if num_keys:
            _backward_keys[triton.cdiv(num_keys, sizes["K"]), self.key_TGE.shape[1]](*arguments, **sizes)

    def row_bounds(self, keys_per_block: int) -> Tensor:
        """Return the row range of each block of keys, int32 [3, N].

        Per block: the first row that sees any of its keys, the first row that sees all of them, and
        the end of the rows that see any.
        """
        position_Q = self.rows.position_Q
        start_Q = self.rows.start_Q
        num_keys = len(self.key_TGE)
        first_N = torch.arange(0, num_keys, keys_per_block, device=position_Q.device)
        last_N = (first_N + keys_per_block - 1).clamp_max(num_keys - 1)
        end_N = torch.searchsorted(start_Q, last_N, right=True)
        is_one_document_N = torch.searchsorted(start_Q, first_N, right=True) == end_N
        whole_N = torch.where(is_one_document_N, torch.searchsorted(position_Q, last_N), end_N)
        return torch.stack((torch.searchsorted(position_Q, first_N), whole_N, end_N)).int()


class _AncestorAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_QHE: Tensor, key_TGE: Tensor, value_TGE: Tensor, rows: AttentionRows, *extras: Tensor):
        output_QHE = torch.empty_like(query_QHE, memory_format=torch.contiguous_format)
        lse_QH = query_QHE.new_empty(query_QHE.shape[:2], dtype=torch.float32)
        _Attention(query_QHE, key_TGE, value_TGE, extras, rows).launch_for_rows(
            _forward, "forward", view_of(output_QHE), lse_QH
        )
        ctx.rows = rows
        ctx.save_for_backward(query_QHE, key_TGE, value_TGE, output_QHE, lse_QH, *extras)
        ctx.mark_non_differentiable(lse_QH)
        return output_QHE, lse_QH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query_QHE, key_TGE, value_TGE, output_QHE, lse_QH, *extras = ctx.saved_tensors
        attention = _Attention(query_QHE, key_TGE, value_TGE, extras, ctx.rows)
        is_tree = ctx.rows.is_tree
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query_QHE, key_TGE, value_TGE)]
        dtype = torch.float32 if is_tree else query_QHE.dtype
        extra_grads = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in extras]
        own_grads = [x.new_empty(len(query_QHE), *x.shape[1:]) for x in extra_grads] if is_tree else extra_grads
        (query_grad, *shared_grads), own = map(view_of, grads), tuple(map(view_of, own_grads))
        grad = view_of(grad_QHE)
        num_extra = len(extras) // 2
        lse2, delta = lse_QH.new_empty(2, key_TGE.shape[1], len(query_QHE), attention.sizes("rows")["R_PAD"])
        inside = view_of(output_QHE), lse_QH, grad, lse2, delta, query_grad
        attention.launch_for_rows(_backward_rows, "rows", *inside, own[:num_extra], own[num_extra:])
        attention.launch_for_keys(grad, lse2, delta, *shared_grads)
        if is_tree:
            for extra_grad, ancestor_Q, own_QGE in zip(extra_grads, 2 * ctx.rows.ancestors, own_grads, strict=True):
                add_rows(extra_grad, ancestor_Q, own_QGE, is_tree)
        return *grads, None, *(extra_grad.to(query_QHE.dtype) for extra_grad in extra_grads)


def ancestor_attention(
    query_QHE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    extra_keys: list[Tensor],
    extra_values: list[Tensor],
    rows: AttentionRows,
) -> tuple[Tensor, Tensor]:
    """Triton implementation of `reference.ancestor_attention`, without host synchronisation.

    No tensor of scores is stored. All tensors share a dtype: bf16, fp16 or fp32. E is at most 256.
    Results are deterministic: the same inputs give the same bits.
    """
    return _AncestorAttention.apply(query_QHE, key_TGE, value_TGE, rows, *extra_keys, *extra_values)
