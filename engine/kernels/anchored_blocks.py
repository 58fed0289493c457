"""Attention of draft blocks in tiles of plain matrix products, in fp32.

This is the implementation for CPUs. A tile consists of some rows, the context tokens that any of
them sees and the rows of their blocks. Its scores are dropped after use; the backward pass recomputes
them. Query heads that share keys become rows of one product, so keys are never repeated. Scores are
masked only where the ranges of a tile's rows differ.

Shapes: Q query rows, n of them in a tile, k keys that a tile reads, T context tokens, P rows of all
blocks, G key/value heads, R query heads per key/value head, m = R n members of a tile, E head dim.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.kernels.interface import BlockRows
from engine.kernels.matmul import batched_product
from engine.kernels.reference import upcast

# Most rows of a tile, and most bytes of its scores in fp32: these stay in the cache between a product and the softmax.
ROWS_PER_TILE = 64
SCORE_BYTES = 1 << 24
# Tiles read whole multiples of this many context keys, so that products have few different sizes.
KEY_GRANULE = 32


def anchored_attention(
    query_QHE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    own_key_PGE: Tensor,
    own_value_PGE: Tensor,
    rows: BlockRows,
) -> Tensor:
    """Tiled implementation of `reference.anchored_attention`.

    A tile has at most `ROWS_PER_TILE` rows, and fewer where their scores would exceed `SCORE_BYTES`, but at least one.
    """
    return _TiledAttention.apply(query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, rows)


class _Tile(NamedTuple):
    """A tile: its rows, and the keys of the context and of the blocks that it reads.

    shared: keys of the context that all of its rows see.
    """

    rows: slice
    context: slice
    own: slice
    shared: slice


def _tiles(rows: BlockRows, num_keys: int, num_heads: int) -> list[_Tile]:
    """Return the tiles of all rows. num_keys: of the context. num_heads: query heads."""
    tiles = []
    host_4Q = rows.bounds_4Q.cpu()
    num_rows = host_4Q.shape[1]
    first = 0
    while first < num_rows:
        candidates = slice(first, min(first + ROWS_PER_TILE, num_rows))
        least, most = _bounds(host_4Q[:, candidates])
        num_seen = max(0, most[1] - least[0]) + most[3] - least[2]
        num_fitting = max(1, SCORE_BYTES // (num_seen * num_heads * torch.float32.itemsize))
        chosen = slice(first, min(first + num_fitting, candidates.stop))
        if chosen != candidates:
            least, most = _bounds(host_4Q[:, chosen])
        first = chosen.stop
        context = slice(0, 0)
        if least[0] < most[1]:
            first_key = least[0] // KEY_GRANULE * KEY_GRANULE
            context = slice(first_key, min(-(-most[1] // KEY_GRANULE) * KEY_GRANULE, num_keys))
        shared_begin = min(max(most[0], context.start), context.stop)
        shared = slice(shared_begin, min(max(shared_begin, least[1]), context.stop))
        tiles.append(_Tile(chosen, context, slice(least[2], most[3]), shared))
    return tiles


def _bounds(host_4n: Tensor) -> tuple[list[int], list[int]]:
    """Return the least and the greatest of each bound of some rows."""
    return host_4n.amin(1).tolist(), host_4n.amax(1).tolist()


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, rows: BlockRows) -> Tensor:
        inputs = _Inputs(query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, rows)
        tiles = _tiles(rows, len(key_TGE), query_QHE.shape[1])
        output_QHE = torch.empty_like(query_QHE, memory_format=torch.contiguous_format)
        for tile in tiles:
            weights_Gmk = inputs.weights(tile, inputs.queries(tile))
            output_GmE = batched_product(weights_Gmk, inputs.values(tile))
            output_QHE[tile.rows] = inputs.by_row(output_GmE)
        ctx.rows = rows
        ctx.tiles = tiles
        ctx.save_for_backward(query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, output_QHE)
        return output_QHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHE: Tensor) -> tuple[Tensor | None, ...]:
        query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, output_QHE = ctx.saved_tensors
        inputs = _Inputs(query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, ctx.rows)
        query_grad_QHE = torch.empty_like(query_QHE, memory_format=torch.contiguous_format)
        key_grads = _KeyGradients(inputs.key_GTE, inputs.own_key_GPE)
        value_grads = _KeyGradients(inputs.value_GTE, inputs.own_value_GPE)
        for tile in ctx.tiles:
            query_GmE = inputs.queries(tile)
            grad_GmE = inputs.members(grad_QHE[tile.rows])
            delta_Gm1 = torch.linalg.vecdot(grad_GmE, inputs.members(output_QHE[tile.rows]))[..., None]
            weights_Gmk = inputs.weights(tile, query_GmE)
            value_grads.add(tile, batched_product(grad_GmE.mT, weights_Gmk))
            scores_grad_Gmk = batched_product(grad_GmE, inputs.values(tile).mT)
            scores_grad_Gmk.sub_(delta_Gm1).mul_(weights_Gmk)
            key_grads.add(tile, batched_product(query_GmE.mT, scores_grad_Gmk))
            query_grad_GmE = batched_product(scores_grad_Gmk, inputs.keys(tile)).mul_(inputs.scale)
            query_grad_QHE[tile.rows] = inputs.by_row(query_grad_GmE)
        grads = (grad_KGE.to(query_QHE.dtype) for grad_KGE in (*key_grads.by_key(), *value_grads.by_key()))
        key_grad, own_key_grad, value_grad, own_value_grad = grads
        return query_grad_QHE, key_grad, value_grad, own_key_grad, own_value_grad, None


class _Inputs:
    """Inputs of one attention call, grouped by key/value head, in fp32 or float64."""

    def __init__(self, query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, rows: BlockRows) -> None:
        _, num_heads, head_dim = query_QHE.shape
        self.num_groups = key_TGE.shape[1]
        self.heads_per_group = num_heads // self.num_groups
        self.scale = head_dim**-0.5
        self.query_QHE = query_QHE
        self.rows = rows
        self.key_GTE = _by_group(key_TGE)
        self.value_GTE = _by_group(value_TGE)
        self.own_key_GPE = _by_group(own_key_PGE)
        self.own_value_GPE = _by_group(own_value_PGE)

    def members(self, x_nHE: Tensor) -> Tensor:
        """Return rows of all heads as the members of a tile, [G, m, E]."""
        x_nGRE = upcast(x_nHE).unflatten(1, (self.num_groups, -1))
        return x_nGRE.permute(1, 2, 0, 3).flatten(1, 2)

    def by_row(self, x_GmE: Tensor) -> Tensor:
        """Return what belongs to the members of a tile as [n, H, E]."""
        return x_GmE.unflatten(1, (self.heads_per_group, -1)).permute(2, 0, 1, 3).flatten(1, 2)

    def queries(self, tile: _Tile) -> Tensor:
        return self.members(self.query_QHE[tile.rows]) * self.scale

    def keys(self, tile: _Tile) -> Tensor:
        """Return the keys of a tile, [G, k, E]: those of the context, then those of the blocks."""
        return torch.cat((self.key_GTE[:, tile.context], self.own_key_GPE[:, tile.own]), 1)

    def values(self, tile: _Tile) -> Tensor:
        return torch.cat((self.value_GTE[:, tile.context], self.own_value_GPE[:, tile.own]), 1)

    def weights(self, tile: _Tile, query_GmE: Tensor) -> Tensor:
        """Compute attention weights [G, m, k], 0 where a row does not see a key."""
        scores_Gmk = batched_product(query_GmE, self.keys(tile).mT)
        rows = self.rows
        context = tile.context
        shared = tile.shared
        context_bounds = rows.context_begin_Q[tile.rows], rows.context_end_Q[tile.rows]
        for keys in (slice(context.start, shared.start), slice(shared.stop, context.stop)):
            self._hide(scores_Gmk, keys, keys.start - context.start, *context_bounds)
        own_bounds = rows.own_begin_Q[tile.rows], rows.own_end_Q[tile.rows]
        self._hide(scores_Gmk, tile.own, context.stop - context.start, *own_bounds)
        return torch.softmax(scores_Gmk, -1, out=scores_Gmk)

    def _hide(self, scores_Gmk: Tensor, keys: slice, first: int, begin_n: Tensor, end_n: Tensor) -> None:
        """Set the scores of keys outside the range of each row to minus infinity. first: column of the first key."""
        if keys.start >= keys.stop:
            return
        key_k = torch.arange(keys.start, keys.stop, device=begin_n.device)
        outside_nk = (key_k < begin_n[:, None]) | (key_k >= end_n[:, None])
        scores_GRnk = scores_Gmk.unflatten(1, (self.heads_per_group, -1))
        scores_GRnk[..., first : first + keys.stop - keys.start].masked_fill_(outside_nk, -torch.inf)


class _KeyGradients:
    """Gradients of keys or values, of the context and of the blocks, summed over tiles."""

    def __init__(self, context_GTE: Tensor, own_GPE: Tensor) -> None:
        # With the head dim first, as the products of a tile have it.
        self._context_GET = torch.zeros_like(context_GTE.mT, memory_format=torch.contiguous_format)
        self._own_GEP = torch.zeros_like(own_GPE.mT, memory_format=torch.contiguous_format)

    def add(self, tile: _Tile, grad_GEk: Tensor) -> None:
        num_context = tile.context.stop - tile.context.start
        self._context_GET[..., tile.context] += grad_GEk[..., :num_context]
        self._own_GEP[..., tile.own] += grad_GEk[..., num_context:]

    def by_key(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the context and of the blocks, [keys, G, E]."""
        return self._context_GET.permute(2, 0, 1).contiguous(), self._own_GEP.permute(2, 0, 1).contiguous()


def _by_group(x_TGE: Tensor) -> Tensor:
    return upcast(x_TGE.transpose(0, 1)).contiguous()
