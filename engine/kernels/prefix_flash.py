"""Ancestor attention that uses flash attention for the causal prefix.

A Triton kernel merges in the ancestors.

Shapes: Q query rows, T packed tokens, D documents, H query heads, G key/value heads, R = H / G
query heads per key/value head, E head dim, A ancestors. Per program: B rows, M members. A member is
a pair of a row and one of the R query heads of a group; the members of a row share their ancestors.
R and E are padded to powers of two. A padding member repeats an existing one and is excluded from
every result.

For each row and head, flash attention returns the output o_p and log-sum-exp lse_p over the prefix.
With s_a = E**-0.5 q . k_a:

    lse = log(exp(lse_p) + sum_a exp(s_a))        o = exp(lse_p - lse) o_p + sum_a exp(s_a - lse) v_a

For any key j of this joint softmax, of the prefix or of an ancestor, with w_j = exp(s_j - lse), the
gradient do of o, and delta = do . o:

    dv_j = sum w_j do        ds_j = w_j (do . v_j - delta)        dq = E**-0.5 sum_j ds_j k_j        dk_j = E**-0.5 sum ds_j q

Flash attention's backward pass stores no weights: it computes w_j and delta from the log-sum-exp
and the output passed to it. Given the merged ones, it returns the prefix's contribution to dq and
the complete dk and dv of the prefix. A second Triton kernel adds the ancestors' contribution to dq
and computes their dk and dv. In a chain each ancestor belongs to one row, so no two rows write to
the same gradient.

The rows of a document [s, e) have successive positions a .. b - 1. The queries of its segment are
those rows and the keys are [s, b), so a causal mask aligned to the bottom right lets the row at
position a + i see [s, a + i]. No row sees the keys [b, e); they form a segment without queries, so
that their gradients are written as zeros. There are always 2 D segments, and they are computed on
the device.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.kernels import flash
from engine.kernels.attention_members import LOG2_E, add_key, members_of
from engine.kernels.flash import HEAD_DIM_GRANULE, MAX_HEAD_DIM, FlashAttention, FlashInputs
from engine.kernels.interface import AttentionRows
from engine.kernels.row_index import add_rows

# Eight numbers per thread: a load takes 16 bytes, and ptxas needs at most 128 registers (sm_90, six
# ancestors). Two programs then share a multiprocessor, and one computes while the other waits.
TILE = 2048
NUMBERS_PER_WARP = 256
MAX_WARPS = 16


@triton.jit
def _load(x, index_N, E: tl.constexpr, E_PAD: tl.constexpr):
    """Load rows of a tensor [any, E] in fp32, with zeros from E on."""
    e_1E = tl.arange(0, E_PAD)[None, :]
    return tl.load(x + index_N[:, None] * E + e_1E, mask=e_1E < E, other=0.0).to(tl.float32)


@triton.jit
def _store(x, index_N, x_NE, exists_N, E: tl.constexpr, E_PAD: tl.constexpr):
    e_1E = tl.arange(0, E_PAD)[None, :]
    tl.store(x + index_N[:, None] * E + e_1E, x_NE.to(x.dtype.element_ty), mask=exists_N[:, None] & (e_1E < E))


@triton.jit
def _ancestor(query_ME, key, value, ancestor_M, scale2, IS_TREE: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr):
    """Load the key and value of each member's ancestor and compute its score to base 2.

    The score is minus infinity if a row lacks the ancestor.
    """
    index_M = tl.maximum(ancestor_M, 0) * tl.num_programs(1) + tl.program_id(1)
    key_ME = _load(key, index_M, E, E_PAD)
    value_ME = _load(value, index_M, E, E_PAD)
    score_M = tl.sum(query_ME * key_ME, 1) * scale2
    return key_ME, value_ME, tl.where(ancestor_M >= 0, score_M, float("-inf")) if IS_TREE else score_M


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    query, keys, values, ancestors, num_rows, scale, prefix_output, prefix_lse, output, lse,
    A: tl.constexpr, IS_TREE: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    row_M, head_M, exists_M = members_of(tl.program_id(0) * (M // R_PAD), num_rows, R, R_PAD, M)
    row_M = row_M.to(tl.int64)
    head_M = head_M.to(tl.int64)
    index_M = row_M * (tl.num_programs(1) * R) + head_M
    lse_index_M = head_M * num_rows + row_M
    query_ME = _load(query, index_M, E, E_PAD)
    sum_ME = _load(prefix_output, index_M, E, E_PAD)
    most_M = tl.load(prefix_lse + lse_index_M) * LOG2_E
    total_M = tl.full([M], 1.0, tl.float32)
    for a in tl.static_range(A):
        ancestor_M = tl.load(ancestors[a] + row_M)
        _, value_ME, score_M = _ancestor(query_ME, keys[a], values[a], ancestor_M, scale * LOG2_E, IS_TREE, E, E_PAD)
        most_M, total_M, sum_ME = add_key(most_M, total_M, sum_ME, score_M, value_ME)
    _store(output, index_M, sum_ME / total_M[:, None], exists_M, E, E_PAD)
    tl.store(lse + lse_index_M, (most_M + tl.log2(total_M)) / LOG2_E, mask=exists_M)


@triton.jit
def _store_own(x, row_B, x_ME, exists_B, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr):
    """Sum over the query heads of a group and store the result for each row's ancestor."""
    x_BE = tl.sum(tl.reshape(x_ME, (x_ME.shape[0] // R_PAD, R_PAD, E_PAD)), 1)
    _store(x, row_B * tl.num_programs(1) + tl.program_id(1), x_BE, exists_B, E, E_PAD)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_backward_kernel(
    query, keys, values, ancestors, num_rows, scale, output, lse, grad, prefix_query_grad, query_grad, key_grads, value_grads,
    A: tl.constexpr, IS_TREE: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Add the ancestors to the query gradient, and compute the gradients of their keys and values.

    key_grads, value_grads: indexed by ancestor, [any, G, E], or in a tree by row, [Q, G, E].
    """
    B: tl.constexpr = M // R_PAD
    row_M, head_M, exists_M = members_of(tl.program_id(0) * (M // R_PAD), num_rows, R, R_PAD, M)
    row_M = row_M.to(tl.int64)
    head_M = head_M.to(tl.int64)
    row_B = tl.program_id(0) * B + tl.arange(0, B)
    exists_B = row_B < num_rows
    row_B = tl.minimum(row_B, num_rows - 1).to(tl.int64)
    index_M = row_M * (tl.num_programs(1) * R) + head_M
    query_ME = _load(query, index_M, E, E_PAD)
    grad_ME = _load(grad, index_M, E, E_PAD)
    delta_M = tl.sum(grad_ME * _load(output, index_M, E, E_PAD), 1)
    # An infinite log-sum-exp gives members that do not exist a weight of zero.
    lse2_M = tl.load(lse + head_M * num_rows + row_M, mask=exists_M, other=float("inf")) * LOG2_E
    sum_ME = tl.zeros([M, E_PAD], tl.float32)
    for a in tl.static_range(A):
        ancestor_M = tl.load(ancestors[a] + row_M)
        key_ME, value_ME, score_M = _ancestor(query_ME, keys[a], values[a], ancestor_M, scale * LOG2_E, IS_TREE, E, E_PAD)
        weight_M = tl.exp2(score_M - lse2_M)
        score_grad_M = weight_M * (tl.sum(grad_ME * value_ME, 1) - delta_M) * scale
        sum_ME += score_grad_M[:, None] * key_ME
        target_B = row_B if IS_TREE else tl.load(ancestors[a] + row_B)
        _store_own(key_grads[a], target_B, score_grad_M[:, None] * query_ME, exists_B, R_PAD, E, E_PAD)
        _store_own(value_grads[a], target_B, weight_M[:, None] * grad_ME, exists_B, R_PAD, E, E_PAD)
    _store(query_grad, index_M, sum_ME + _load(prefix_query_grad, index_M, E, E_PAD), exists_M, E, E_PAD)


def _nothing(inputs: FlashInputs) -> tuple[Tensor, Tensor]:
    query_QHE = inputs.query_QHE
    return torch.empty_like(query_QHE), query_QHE.new_empty(query_QHE.shape[1::-1], dtype=torch.float32)


_NO_ROWS = FlashAttention("no rows", _nothing, lambda inputs, *_: tuple(map(torch.zeros_like, inputs[:3])), False)


def refusal(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """Return why this attention cannot run on the device, in one sentence, or None if it can."""
    if head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_GRANULE:
        return f"flash attention needs a head dim of at most {MAX_HEAD_DIM}, a multiple of {HEAD_DIM_GRANULE}, not {head_dim}"
    return flash.refusal(dtype, device)


def _segments(rows: AttentionRows) -> tuple[Tensor, Tensor]:
    """Return the segment starts of queries and of keys, int32 [2 D + 1] each.

    Each document has two segments: its rows with the keys they see, then its remaining keys.
    """
    start_D = rows.cu_seqlens.long()
    position_Q = rows.position_Q.contiguous()
    row_D = torch.searchsorted(position_Q, start_D)
    last_D = torch.nn.functional.pad(position_Q, (1, 0))[row_D[1:]]
    seen_D = torch.where(row_D[1:] > row_D[:-1], last_D + 1, start_D[:-1])
    cu_queries = torch.cat((torch.stack((row_D[:-1], row_D[1:]), 1).flatten(), row_D[-1:]))
    cu_keys = torch.cat((torch.stack((start_D[:-1], seen_D), 1).flatten(), start_D[-1:]))
    return cu_queries.int(), cu_keys.int()


class _Merge(NamedTuple):
    """The arguments of one merge, with methods that launch its kernels.

    extras: keys of the ancestors, then their values, contiguous.
    """

    inputs: FlashInputs
    rows: AttentionRows
    extras: tuple[Tensor, ...]

    def launch(self, kernel: Any, *arguments: Any) -> None:
        (num_rows, num_heads, head_dim), num_groups = self.inputs.query_QHE.shape, self.inputs.key_TGE.shape[1]
        num_extra = len(self.rows.ancestors)
        heads_per_group = num_heads // num_groups
        padded_heads, padded_head_dim = map(triton.next_power_of_2, (heads_per_group, head_dim))
        members = max(padded_heads, TILE // padded_head_dim)
        sizes = {"R": heads_per_group, "R_PAD": padded_heads, "E": head_dim, "E_PAD": padded_head_dim, "M": members}
        num_warps = min(max(members * padded_head_dim // NUMBERS_PER_WARP, 1), MAX_WARPS)
        ancestors = tuple(ancestor_Q.contiguous() for ancestor_Q in self.rows.ancestors)
        extras = tuple(self.extras[:num_extra]), tuple(self.extras[num_extra:])
        shared = self.inputs.query_QHE, *extras, ancestors, num_rows, self.inputs.scale
        grid = triton.cdiv(num_rows, members // padded_heads), num_groups
        if num_rows:
            kernel[grid](*shared, *arguments, A=num_extra, IS_TREE=self.rows.is_tree, **sizes, num_warps=num_warps)

    def forward(self, prefix_output_QHE: Tensor, prefix_lse_HQ: Tensor) -> tuple[Tensor, Tensor]:
        # Not in place: two threads may read the same number, and one could overwrite it before the
        # other has read it.
        output_QHE = torch.empty_like(self.inputs.query_QHE)
        lse_HQ = torch.empty_like(prefix_lse_HQ)
        self.launch(_merge_kernel, prefix_output_QHE, prefix_lse_HQ, output_QHE, lse_HQ)
        return output_QHE, lse_HQ

    def backward(self, grad_QHE: Tensor, output_QHE: Tensor, lse_HQ: Tensor, prefix_query_grad_QHE: Tensor) -> list[Tensor]:
        """Compute the gradients of the queries and of the extras."""
        query_QHE = self.inputs.query_QHE
        is_tree = self.rows.is_tree
        num_extra = len(self.rows.ancestors)
        dtype = torch.float32 if is_tree else query_QHE.dtype
        extra_grads = [torch.zeros_like(x, dtype=dtype) for x in self.extras]
        own_grads = [x.new_empty(len(query_QHE), *x.shape[1:]) for x in extra_grads] if is_tree else extra_grads
        query_grad_QHE = torch.empty_like(query_QHE)
        own = tuple(own_grads)
        results = output_QHE, lse_HQ, grad_QHE, prefix_query_grad_QHE, query_grad_QHE, own[:num_extra], own[num_extra:]
        self.launch(_merge_backward_kernel, *results)
        if is_tree:
            for extra_grad, ancestor_Q, own_QGE in zip(extra_grads, 2 * self.rows.ancestors, own_grads, strict=True):
                add_rows(extra_grad, ancestor_Q, own_QGE, is_tree)
        return [query_grad_QHE, *(extra_grad.to(query_QHE.dtype) for extra_grad in extra_grads)]


class _PrefixFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prefix: FlashAttention, rows: AttentionRows, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        query_QHE, key_TGE, value_TGE, *extras = (x.contiguous() for x in tensors)
        cu_queries, cu_keys = _segments(rows)
        inputs = FlashInputs(query_QHE, key_TGE, value_TGE, cu_queries, cu_keys, longest=rows.longest)
        output_QHE, lse_HQ = prefix.forward(inputs)
        if extras:
            output_QHE, lse_HQ = _Merge(inputs, rows, tuple(extras)).forward(output_QHE, lse_HQ)
        ctx.prefix = prefix
        ctx.rows = rows
        ctx.save_for_backward(*inputs[:5], output_QHE, lse_HQ, *extras)
        lse_QH = lse_HQ.t()
        ctx.mark_non_differentiable(lse_QH)
        return output_QHE, lse_QH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query_QHE, key_TGE, value_TGE, cu_queries, cu_keys = ctx.saved_tensors[:5]
        inputs = FlashInputs(query_QHE, key_TGE, value_TGE, cu_queries, cu_keys, longest=ctx.rows.longest)
        output_QHE, lse_HQ, *extras = ctx.saved_tensors[5:]
        results = grad_QHE.contiguous(), output_QHE, lse_HQ
        query_grad_QHE, key_grad_TGE, value_grad_TGE = ctx.prefix.backward(inputs, *results)
        extra_grads = []
        if extras:
            merge = _Merge(inputs, ctx.rows, tuple(extras))
            query_grad_QHE, *extra_grads = merge.backward(*results, query_grad_QHE.contiguous())
        return None, None, query_grad_QHE, key_grad_TGE, value_grad_TGE, *extra_grads


def ancestor_attention(
    query_QHE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    extra_keys: list[Tensor],
    extra_values: list[Tensor],
    rows: AttentionRows,
) -> tuple[Tensor, Tensor]:
    """Implementation of `reference.ancestor_attention` by flash attention and a merge kernel.

    It does not synchronise with the host. The rows of each document must have successive positions.
    All tensors share one dtype, bf16 or fp16; `refusal` states the other requirements.
    Raises ValueError if no flash attention is installed.
    """
    prefix = flash.available_flash()
    if prefix is None:
        raise ValueError("expected flash-attn 2.7+ or PyTorch for CUDA with flash attention, found neither; install one")
    prefix = prefix if len(query_QHE) else _NO_ROWS
    return _PrefixFlash.apply(prefix, rows, query_QHE, key_TGE, value_TGE, *extra_keys, *extra_values)
