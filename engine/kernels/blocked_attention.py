"""Ancestor attention in blocks of plain matrix products, in fp32.

This is the implementation for CPUs. A block consists of some rows of one document and the keys that
they may see. Its scores are dropped after use; the backward pass recomputes them from the
log-sum-exp. Query heads that share keys become rows of one product, so keys are never repeated.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.kernels.interface import AttentionRows
from engine.kernels.matmul import batched_product
from engine.kernels.row_index import add_rows

ROWS_PER_BLOCK = 256


def ancestor_attention(
    query_QHE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    extra_keys: list[Tensor],
    extra_values: list[Tensor],
    rows: AttentionRows,
) -> tuple[Tensor, Tensor]:
    """Blocked implementation of `reference.ancestor_attention`.

    No matrix of scores is larger than `ROWS_PER_BLOCK` rows of all heads.
    """
    blocks = list(_blocks(rows.position_Q, rows.cu_seqlens))
    return _BlockedAttention.apply(query_QHE, key_TGE, value_TGE, rows, blocks, *extra_keys, *extra_values)


class _Block(NamedTuple):
    rows: slice
    keys: slice


def _blocks(position_Q: Tensor, cu_seqlens: Tensor) -> Iterator[_Block]:
    """Yield blocks of up to `ROWS_PER_BLOCK` rows of a document, with the keys that they see."""
    bounds = torch.searchsorted(position_Q, cu_seqlens.long()).tolist()
    position = position_Q.tolist()
    for document, start in enumerate(cu_seqlens[:-1].tolist()):
        for first in range(bounds[document], bounds[document + 1], ROWS_PER_BLOCK):
            end = min(first + ROWS_PER_BLOCK, bounds[document + 1])
            yield _Block(slice(first, end), slice(start, position[end - 1] + 1))


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_QHE, key_TGE, value_TGE, rows: AttentionRows, blocks: list[_Block], *extras: Tensor):
        ctx.rows = rows
        ctx.blocks = blocks
        inputs = _Inputs(query_QHE, key_TGE, value_TGE, rows, extras)
        output_QHE = torch.empty_like(query_QHE, memory_format=torch.contiguous_format)
        lse_GRQ = query_QHE.new_empty(inputs.num_groups, inputs.heads_per_group, query_QHE.shape[0], dtype=torch.float32)
        for block in blocks:
            output_GRnE, lse_GRQ[:, :, block.rows] = _attend(inputs, block)
            output_QHE[block.rows] = inputs.ungrouped(output_GRnE)
        ctx.save_for_backward(query_QHE, key_TGE, value_TGE, output_QHE, lse_GRQ, *extras)
        lse_QH = inputs.ungrouped(lse_GRQ[..., None])[..., 0]
        ctx.mark_non_differentiable(lse_QH)
        return output_QHE, lse_QH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query_QHE, key_TGE, value_TGE, output_QHE, lse_GRQ, *extras = ctx.saved_tensors
        inputs = _Inputs(query_QHE, key_TGE, value_TGE, ctx.rows, extras)
        query_grad_QHE = torch.empty_like(query_QHE, memory_format=torch.contiguous_format)
        key_grad_GTE = torch.zeros_like(inputs.key_GTE)
        value_grad_GTE = torch.zeros_like(inputs.value_GTE)
        extra_grad_AGQE = torch.empty_like(inputs.extra_AGQE)
        for block in ctx.blocks:
            rows, keys = block
            grad_GRnE = inputs.grouped(grad_QHE[rows])
            output_GRnE = inputs.grouped(output_QHE[rows])
            grads = _attend_backward(inputs, block, grad_GRnE, output_GRnE, lse_GRQ[:, :, rows])
            query_grad_QHE[rows] = inputs.ungrouped(grads.query_GRnE)
            key_grad_GTE[:, keys] += grads.key_GkE
            value_grad_GTE[:, keys] += grads.value_GkE
            extra_grad_AGQE[:, :, rows] = grads.extra_AGnE
        extra_grads = [torch.zeros_like(extra, memory_format=torch.contiguous_format) for extra in extras]
        for extra_grad, ancestor_Q, own_GQE in zip(extra_grads, 2 * ctx.rows.ancestors, extra_grad_AGQE, strict=True):
            add_rows(extra_grad, ancestor_Q, own_GQE.transpose(0, 1), ctx.rows.is_tree)
        shared = (x_GTE.transpose(0, 1).to(key_TGE.dtype) for x_GTE in (key_grad_GTE, value_grad_GTE))
        return query_grad_QHE, *shared, None, None, *extra_grads


class _Inputs:
    """Inputs of one attention call, grouped by key/value head.

    key_GTE, value_GTE: fp32 [G, T, E].
    extra_AGQE: fp32 [2 A, G, Q, E], keys of each row's ancestors, then their values.
    Queries are grouped per block, as [G, R, n, E] with the R query heads of a group.
    """

    def __init__(self, query_QHE, key_TGE, value_TGE, rows: AttentionRows, extras) -> None:
        _, num_heads, head_dim = query_QHE.shape
        self.num_groups = key_TGE.shape[1]
        self.scale = head_dim**-0.5
        self.heads_per_group = num_heads // self.num_groups
        self.query_QHE = query_QHE
        self.rows = rows
        self.key_GTE, self.value_GTE = (x_TGE.transpose(0, 1).float().contiguous() for x_TGE in (key_TGE, value_TGE))
        chosen = [extra[ancestor_Q] for extra, ancestor_Q in zip(extras, 2 * rows.ancestors, strict=True)]
        shape = 0, len(query_QHE), *key_TGE.shape[1:]
        self.extra_AGQE = (torch.stack(chosen) if chosen else key_TGE.new_empty(shape)).float().transpose(1, 2)

    def grouped(self, x_nHE: Tensor) -> Tensor:
        """Return [n, H, E] as contiguous fp32 [G, R, n, E]."""
        return x_nHE.unflatten(1, (self.num_groups, self.heads_per_group)).permute(1, 2, 0, 3).float().contiguous()

    def ungrouped(self, x_GRnE: Tensor) -> Tensor:
        return x_GRnE.permute(2, 0, 1, 3).flatten(1, 2)

    def queries(self, block: _Block) -> Tensor:
        return self.grouped(self.query_QHE[block.rows]) * self.scale

    def scores(self, block: _Block, query_GRnE: Tensor) -> Tensor:
        """Compute scores [G, R, n, k], with minus infinity where a key comes after its row."""
        scores_GRnk = batched_product(query_GRnE.flatten(1, 2), self.key_GTE[:, block.keys].mT).unflatten(
            1, query_GRnE.shape[1:3]
        )
        key_k = torch.arange(block.keys.start, block.keys.stop, device=scores_GRnk.device)
        return scores_GRnk.masked_fill_(key_k > self.rows.position_Q[block.rows, None], -torch.inf)

    def ancestors(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Return keys and values of the block's ancestors, fp32 [A, G, 1, n, E] each."""
        keys_AG1nE, values_AG1nE = self.extra_AGQE[:, :, None, block.rows].chunk(2)
        return keys_AG1nE, values_AG1nE

    def ancestor_scores(self, block: _Block, query_GRnE: Tensor, key_AG1nE: Tensor) -> Tensor:
        """Compute ancestor scores [A, G, R, n], minus infinity where a row lacks the ancestor."""
        scores_AGRn = (query_GRnE * key_AG1nE).sum(-1)
        if not self.rows.is_tree:
            return scores_AGRn
        lacking_An = torch.stack([ancestor_Q[block.rows] for ancestor_Q in self.rows.ancestors]) < 0
        return scores_AGRn.masked_fill_(lacking_An[:, None, None], -torch.inf)


def _attend(inputs: _Inputs, block: _Block) -> tuple[Tensor, Tensor]:
    """Compute the output [G, R, n, E] and log-sum-exp [G, R, n] of a block."""
    query_GRnE = inputs.queries(block)
    scores_GRnk = inputs.scores(block, query_GRnE)
    most_GRn = scores_GRnk.amax(-1)
    if inputs.rows.ancestors:
        key_AG1nE, value_AG1nE = inputs.ancestors(block)
        extra_AGRn = inputs.ancestor_scores(block, query_GRnE, key_AG1nE)
        most_GRn = torch.maximum(most_GRn, extra_AGRn.amax(0))
    weights_GRnk = scores_GRnk.sub_(most_GRn[..., None]).exp_()
    total_GRn = weights_GRnk.sum(-1)
    output_GRnE = batched_product(weights_GRnk.flatten(1, 2), inputs.value_GTE[:, block.keys]).view_as(query_GRnE)
    if inputs.rows.ancestors:
        extra_AGRn = extra_AGRn.sub_(most_GRn).exp_()
        total_GRn += extra_AGRn.sum(0)
        output_GRnE += (extra_AGRn[..., None] * value_AG1nE).sum(0)
    return output_GRnE.div_(total_GRn[..., None]), total_GRn.log_().add_(most_GRn)


class _Gradients(NamedTuple):
    """Gradients of one block. extra_AGnE: of its ancestors' keys, then of their values."""

    query_GRnE: Tensor
    key_GkE: Tensor
    value_GkE: Tensor
    extra_AGnE: Tensor


def _attend_backward(inputs: _Inputs, block: _Block, grad_GRnE: Tensor, output_GRnE: Tensor, lse_GRn: Tensor) -> _Gradients:
    query_GRnE = inputs.queries(block)
    delta_GRn = (grad_GRnE * output_GRnE).sum(-1)
    weights_GRnk = inputs.scores(block, query_GRnE).sub_(lse_GRn[..., None]).exp_()
    grad_GmE, weights_Gmk, query_GmE = (x.flatten(1, 2) for x in (grad_GRnE, weights_GRnk, query_GRnE))
    value_GkE = batched_product(weights_Gmk.mT, grad_GmE)
    scores_grad_GRnk = batched_product(grad_GmE, inputs.value_GTE[:, block.keys].mT).view_as(weights_GRnk)
    scores_grad_Gmk = scores_grad_GRnk.sub_(delta_GRn[..., None]).mul_(weights_GRnk).flatten(1, 2)
    query_grad_GRnE = batched_product(scores_grad_Gmk, inputs.key_GTE[:, block.keys]).view_as(query_GRnE)
    key_GkE = batched_product(scores_grad_Gmk.mT, query_GmE)
    extra_AGnE = inputs.extra_AGQE[:, :, block.rows]
    if inputs.rows.ancestors:
        key_AG1nE, value_AG1nE = inputs.ancestors(block)
        weights_AGRn = inputs.ancestor_scores(block, query_GRnE, key_AG1nE).sub_(lse_GRn).exp_()
        scores_grad_AGRn1 = (grad_GRnE * value_AG1nE).sum(-1).sub_(delta_GRn).mul_(weights_AGRn)[..., None]
        query_grad_GRnE += (scores_grad_AGRn1 * key_AG1nE).sum(0)
        key_grad_AGnE = (scores_grad_AGRn1 * query_GRnE).sum(2)
        value_grad_AGnE = (weights_AGRn[..., None] * grad_GRnE).sum(2)
        extra_AGnE = torch.cat((key_grad_AGnE, value_grad_AGnE))
    return _Gradients(query_grad_GRnE.mul_(inputs.scale), key_GkE, value_GkE, extra_AGnE)
