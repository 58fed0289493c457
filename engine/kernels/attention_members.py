"""Parts that the Triton kernels of attention share: members of a block, views of tensors, and a running softmax.

A member is a pair of a row and one of the R query heads of a group; the members of a row share
their keys. R and the head dim E are padded to powers of two. Per program: M members, K keys.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.attention_tiles import padded_head_dim, tile_of

LOG2_E = tl.constexpr(1.4426950408889634)
# Less than any score, yet finite: a block may hold no key that a row sees, and -inf - -inf is NaN.
NO_SCORE = tl.constexpr(-1e38)


class View(NamedTuple):
    """A tensor [rows, heads, E] that is contiguous in its last dimension."""

    pointer: Tensor
    row_stride: int
    head_stride: int


def view_of(x: Tensor) -> View:
    """Return the view of a tensor, or of a copy if its last dimension is not contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return View(x, x.stride(0), x.stride(1))


def launch_sizes(kernel: str, query_QHE: Tensor, key_TGE: Tensor) -> dict[str, int]:
    """Return the compile-time constants of a kernel. kernel: "forward", "rows" or "keys"."""
    _, num_heads, head_dim = query_QHE.shape
    heads_per_group = num_heads // key_TGE.shape[1]
    padded_heads = triton.next_power_of_2(heads_per_group)
    padded = padded_head_dim(head_dim)
    tile = tile_of(kernel, padded, query_QHE.element_size())
    sizes = {"R": heads_per_group, "R_PAD": padded_heads, "E": head_dim, "E_PAD": padded}
    sizes |= {"M": max(tile.members, padded_heads), "K": tile.keys}
    return sizes | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


@triton.jit
def members_of(first, end, R: tl.constexpr, R_PAD: tl.constexpr, M: tl.constexpr):
    """Return the row and query head of each member of a block, and whether the member exists.

    first: first row of the block. end: index after the last row that exists. A padding member
    repeats an existing one. The group of heads is the second index of the program.
    """
    member_M = tl.arange(0, M)
    row_M = first + member_M // R_PAD
    head_M = member_M % R_PAD
    exists_M = (row_M < end) & (head_M < R)
    return tl.minimum(row_M, end - 1), tl.program_id(1) * R + tl.minimum(head_M, R - 1), exists_M


@triton.jit
def adjacent_members(first, end, num_rows, R_PAD: tl.constexpr, M: tl.constexpr):
    """Return the offsets of a block's members in [G, Q, R_PAD], and whether their rows exist.

    In this layout the members of a block are contiguous, so loads are coalesced.
    """
    member_M = tl.arange(0, M)
    return (tl.program_id(1).to(tl.int64) * num_rows + first) * R_PAD + member_M, member_M < (end - first) * R_PAD


@triton.jit
def _pointers(view, row_N, head, E_PAD: tl.constexpr):
    offset_N = row_N.to(tl.int64) * view.row_stride + head.to(tl.int64) * view.head_stride
    return view.pointer + offset_N[:, None] + tl.arange(0, E_PAD)[None, :]


@triton.jit
def load_rows(view, row_N, head, E: tl.constexpr, E_PAD: tl.constexpr):
    """Load rows of one head, [N, E_PAD], with zeros from E on."""
    pointer_NE = _pointers(view, row_N, head, E_PAD)
    exists_1E = tl.arange(0, E_PAD)[None, :] < E
    return tl.load(pointer_NE) if E == E_PAD else tl.load(pointer_NE, mask=exists_1E, other=0.0)


@triton.jit
def store_rows(view, row_N, head, x_NE, exists_N, E: tl.constexpr, E_PAD: tl.constexpr):
    """Store rows of one head in the precision of the view."""
    exists_NE = exists_N[:, None] & (tl.arange(0, E_PAD)[None, :] < E)
    tl.store(_pointers(view, row_N, head, E_PAD), x_NE.to(view.pointer.dtype.element_ty), mask=exists_NE)


@triton.jit
def add_key(most_M, total_M, sum_ME, score_M, value_ME):
    """Add one key per member to a running softmax to base 2.

    Return the new maximum of the scores, total of the weights and weighted sum of the values.
    """
    new_M = tl.maximum(most_M, score_M)
    weight_M = tl.exp2(score_M - new_M)
    shrink_M = tl.exp2(most_M - new_M)
    return new_M, total_M * shrink_M + weight_M, sum_ME * shrink_M[:, None] + weight_M[:, None] * value_ME


@triton.jit
def add_keys(most_M, total_M, sum_ME, query_ME, key_KE, value_KE, is_seen_MK, scale2):
    """Add a block of keys to a running softmax to base 2. is_seen_MK: None = all members see all keys."""
    score_MK = tl.dot(query_ME, tl.trans(key_KE), input_precision="ieee") * scale2
    if is_seen_MK is not None:
        score_MK = tl.where(is_seen_MK, score_MK, float("-inf"))
    new_M = tl.maximum(most_M, tl.max(score_MK, 1))
    weight_MK = tl.exp2(score_MK - new_M[:, None])
    shrink_M = tl.exp2(most_M - new_M)
    total_M = total_M * shrink_M + tl.sum(weight_MK, 1)
    sum_ME = tl.dot(weight_MK.to(value_KE.dtype), value_KE, sum_ME * shrink_M[:, None], input_precision="ieee")
    return new_M, total_M, sum_ME


@triton.jit
def weigh(query_NE, key_PE, grad_NE, value_PE, is_seen_NP, scale2, lse2, delta):
    """Compute attention weights and the gradients of the scores, both [N, P].

    The roles can be swapped: N queries and P keys with (grad, value), or N keys and P queries with
    (value, grad).
    """
    score_NP = tl.dot(query_NE, tl.trans(key_PE), input_precision="ieee") * scale2
    if is_seen_NP is not None:
        score_NP = tl.where(is_seen_NP, score_NP, float("-inf"))
    weight_NP = tl.exp2(score_NP - lse2)
    score_grad_NP = weight_NP * (tl.dot(grad_NE, tl.trans(value_PE), input_precision="ieee") - delta)
    return weight_NP, score_grad_NP


@triton.jit
def store_attention(
    output, lse, row_M, head_M, exists_M, most_M, total_M, sum_ME, R: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr
):
    """Store the outputs of a finished running softmax, and its log-sum-exp, [Q, H], to base e."""
    store_rows(output, row_M, head_M, sum_ME / total_M[:, None], exists_M, E, E_PAD)
    lse_M = (most_M + tl.log2(total_M)) / LOG2_E
    tl.store(lse + row_M.to(tl.int64) * (tl.num_programs(1) * R) + head_M, lse_M, mask=exists_M)


@triton.jit
def load_gradient(
    output, lse, grad, lse2, delta, first, num_rows, row_M, head_M, exists_M,
    R: tl.constexpr, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Load what the backward pass of a block of rows begins with: (grad_ME, lse2_M, delta_M).

    lse2_M: log-sum-exp to base 2. delta_M: product of each output with its gradient. Both are also
    stored for the gradients of the keys, [G, Q, R_PAD]. first: first row of the block.
    """
    grad_ME = load_rows(grad, row_M, head_M, E, E_PAD)
    delta_M = tl.sum(grad_ME.to(tl.float32) * load_rows(output, row_M, head_M, E, E_PAD).to(tl.float32), 1)
    # An infinite log-sum-exp gives members that do not exist a weight of zero.
    lse2_M = tl.load(lse + row_M.to(tl.int64) * (tl.num_programs(1) * R) + head_M, mask=exists_M, other=float("inf")) * LOG2_E
    member_M, is_kept_M = adjacent_members(first, num_rows, num_rows, R_PAD, M)
    tl.store(lse2 + member_M, lse2_M, mask=is_kept_M)
    tl.store(delta + member_M, delta_M, mask=is_kept_M)
    return grad_ME, lse2_M, delta_M


@triton.jit
def add_gradients_of_keys(
    key_sum_KE, value_sum_KE, key_KE, value_KE, query, grad, lse2, delta, row, stop, num_rows, row_M, head_M, is_seen_KM,
    scale2, R_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Add the share of a block of rows, from `row` to at most `stop`, to the gradients of keys, without the scale.

    lse2, delta: as `load_gradient` stores them. is_seen_KM: None = all members see all keys.
    """
    member_M, exists_M = adjacent_members(row, stop, num_rows, R_PAD, M)
    query_ME = load_rows(query, row_M, head_M, E, E_PAD)
    grad_ME = load_rows(grad, row_M, head_M, E, E_PAD)
    lse2_1M = tl.load(lse2 + member_M, mask=exists_M, other=float("inf"))[None, :]
    delta_1M = tl.load(delta + member_M, mask=exists_M, other=0.0)[None, :]
    weight_KM, score_grad_KM = weigh(key_KE, query_ME, value_KE, grad_ME, is_seen_KM, scale2, lse2_1M, delta_1M)
    value_sum_KE = tl.dot(weight_KM.to(grad_ME.dtype), grad_ME, value_sum_KE, input_precision="ieee")
    key_sum_KE = tl.dot(score_grad_KM.to(query_ME.dtype), query_ME, key_sum_KE, input_precision="ieee")
    return key_sum_KE, value_sum_KE
