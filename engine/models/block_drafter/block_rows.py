"""Plan of the rows of a micro-batch's blocks: which run, what they see and what they learn.

A block has rows `k = 0 .. B-1`. Row 0 reads the anchor's token, the others the mask token. Row `k`
drafts the token at position `a + k + shift`: `shift` is 1 if the anchor's own row drafts the token
after it, otherwise 0 and row 0 drafts nothing.

Rows that no loss depends on do not run: blocks without loss, rows after the last row with loss if
rows see earlier rows only, and, in the last layer, every row without loss, or, where a method mixes
rows with those before them, every row after the last one with loss. Context tokens that no block
sees are left out as well.

Shapes: T packed tokens, C context tokens that are kept, N blocks, P rows that run, R rows with loss.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from engine.batch import PackedBatch
from engine.kernels import BlockRows


def is_causal_layer(is_causal: bool | None, window: int | None) -> bool:
    """Return whether the rows of a block see earlier rows of it only, in a layer with a window or with none.

    is_causal: of all layers; None = as servers do if a config.json does not say, in the layers that have a window.
    """
    return window is not None if is_causal is None else is_causal


@dataclass(frozen=True)
class BlockShape:
    """What the plan needs to know of a draft.

    block_size: rows B. shift: see above.
    windows: sliding window of each layer; None = full attention.
    is_causal: whether rows see earlier rows of their block only; None = in the layers that have a window.
    window_from_anchor: count windows from the anchor and not from each row, as speculators does.
    window_in_block: whether windows limit the rows that a row sees of its own block too, as servers do
        where rows see earlier rows only. It matters if a window is smaller than a block.
    """

    block_size: int
    shift: int
    windows: tuple[int | None, ...]
    is_causal: bool | None
    window_from_anchor: bool = False
    window_in_block: bool = True


@dataclass(frozen=True)
class BlockPlan:
    """The rows of the blocks of a micro-batch.

    context_C: int64, packed positions of the context tokens that are kept; None = all of them.
    context_position_C: int64, their rotary positions.
    anchor_N: int64, packed position of each block's anchor.
    first_row_N: int64, index of each block's first row among the rows.
    block_P, offset_P: int64, block of each row, and its index `k` in it.
    position_P: int64, rotary position of each row.
    layers: for each layer, what its rows see.
    loss_row_R: int64, index of each row with loss among the P rows.
    prediction_R: int64, index `i` of what it predicts. slot_R: int64, packed position of its slot.
    """

    context_C: Tensor | None
    context_position_C: Tensor
    anchor_N: Tensor
    first_row_N: Tensor
    block_P: Tensor
    offset_P: Tensor
    position_P: Tensor
    layers: tuple[BlockRows, ...]
    loss_row_R: Tensor
    prediction_R: Tensor
    slot_R: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.block_P)

    @cached_property
    def leading_row_Q(self) -> Tensor:
        """Index of each row that has a row with loss in its block at or after itself, int64, ascending."""
        last_N = torch.full_like(self.anchor_N, -1)
        loss_block_R = self.block_P[self.loss_row_R]
        last_N.scatter_reduce_(0, loss_block_R, self.offset_P[self.loss_row_R], "amax")
        return (self.offset_P <= last_N[self.block_P]).nonzero().flatten()


def plan_blocks(batch: PackedBatch, allowed_ST: Tensor, shape: BlockShape, compaction: bool = True) -> BlockPlan:
    """Return the plan of the blocks that `allowed_ST` has rows of. Reads from the device a few times.

    allowed_ST: bool [S, T], rows that learn, from `AnchorRule.rows`.
    compaction: whether to leave out the rows and context tokens that no loss depends on.
    """
    position_N = allowed_ST.any(0).nonzero().flatten()
    return plan_anchors(batch, position_N + 1, allowed_ST[:, position_N].T, shape, compaction)


def plan_anchors(
    batch: PackedBatch, anchor_N: Tensor, learns_NS: Tensor, shape: BlockShape, compaction: bool = True
) -> BlockPlan:
    """Return the plan of blocks at given anchors.

    anchor_N: int64, packed positions, ascending; from 1 on. learns_NS: bool, which predictions of each block learn.
    """
    device = anchor_N.device
    num_blocks, num_predictions = learns_NS.shape
    drops_tail = compaction and all(is_causal_layer(shape.is_causal, window) for window in shape.windows)
    sizes_N = torch.full_like(anchor_N, shape.block_size)
    if drops_tail:
        last_N = (learns_NS * torch.arange(1, num_predictions + 1, device=device)).amax(1)
        sizes_N = last_N + (1 - shape.shift)
    end_row_N = sizes_N.cumsum(0)
    first_row_N = end_row_N - sizes_N
    block_P = torch.repeat_interleave(torch.arange(num_blocks, device=device), sizes_N)
    offset_P = torch.arange(len(block_P), device=device) - first_row_N[block_P]
    prediction_P = offset_P - (1 - shape.shift)
    learns_P = (prediction_P >= 0) & learns_NS[block_P, prediction_P.clamp(0, num_predictions - 1)]
    loss_row_R = learns_P.nonzero().flatten()

    starts = batch.cu_seqlens.long()
    document_N = torch.searchsorted(starts, anchor_N, right=True) - 1
    start_N = starts[document_N]
    context_C = None
    if compaction:
        context_C = _seen_context(batch, anchor_N, start_N, shape)
    finder = _RangeFinder(anchor_N, start_N, first_row_N, end_row_N, block_P, offset_P, context_C, shape)
    position_T = batch.position_T
    return BlockPlan(
        context_C=context_C,
        context_position_C=position_T if context_C is None else position_T[context_C],
        anchor_N=anchor_N,
        first_row_N=first_row_N,
        block_P=block_P,
        offset_P=offset_P,
        position_P=(anchor_N - start_N)[block_P] + offset_P,
        layers=tuple(finder.rows(window) for window in shape.windows),
        loss_row_R=loss_row_R,
        prediction_R=prediction_P[loss_row_R],
        slot_R=anchor_N[block_P[loss_row_R]] + prediction_P[loss_row_R],
    )


def _seen_context(batch: PackedBatch, anchor_N: Tensor, start_N: Tensor, shape: BlockShape) -> Tensor | None:
    """Return the packed positions of the context tokens that a block sees, int64 ascending; None = all tokens."""
    num_tokens = batch.num_tokens
    change_T = torch.zeros(num_tokens + 1, dtype=torch.long, device=anchor_N.device)
    first_N = start_N
    if all(window is not None for window in shape.windows):
        reach = max(window for window in shape.windows if window is not None)
        if not shape.window_from_anchor:
            # The window of an anchor's own row, which sees the farthest, holds the row itself.
            reach -= 1
        first_N = torch.maximum(start_N, anchor_N - reach)
    change_T.index_add_(0, first_N, torch.ones_like(anchor_N))
    change_T.index_add_(0, anchor_N, -torch.ones_like(anchor_N))
    context_C = (change_T.cumsum(0)[:num_tokens] > 0).nonzero().flatten()
    return None if len(context_C) == num_tokens else context_C


class _RangeFinder:
    """Finds the keys that rows see, per window."""

    def __init__(
        self,
        anchor_N: Tensor,
        start_N: Tensor,
        first_row_N: Tensor,
        end_row_N: Tensor,
        block_P: Tensor,
        offset_P: Tensor,
        context_C: Tensor | None,
        shape: BlockShape,
    ) -> None:
        self._anchor_P = anchor_N[block_P]
        self._start_P = start_N[block_P]
        self._first_row_P = first_row_N[block_P]
        self._end_row_P = end_row_N[block_P]
        self._offset_P = offset_P
        self._context_C = context_C
        self._shape = shape
        self.rows = cache(self._rows)

    def _rows(self, window: int | None) -> BlockRows:
        """Return what all rows see in a layer with a window, or with none."""
        shape = self._shape
        is_causal = is_causal_layer(shape.is_causal, window)
        begin_P = self._start_P
        own_begin_P = self._first_row_P
        own_end_P = self._end_row_P
        row_P = torch.arange(len(own_end_P), device=own_end_P.device)
        if is_causal:
            own_end_P = row_P + 1
        if window is not None:
            earliest_P = self._anchor_P - window
            if not shape.window_from_anchor:
                earliest_P = earliest_P + self._offset_P + 1
            begin_P = torch.maximum(begin_P, earliest_P)
            if is_causal and shape.window_in_block:
                own_begin_P = torch.maximum(own_begin_P, row_P + 1 - window)
        end_P = self._anchor_P
        if self._context_C is not None:
            begin_P = torch.searchsorted(self._context_C, begin_P)
            end_P = torch.searchsorted(self._context_C, end_P)
        return BlockRows(torch.minimum(begin_P, end_P), end_P, own_begin_P, own_end_P)


def prediction_slots(allowed_ST: Tensor) -> Tensor:
    """Return the positions that at least one row learns, int64 [N], ascending."""
    num_predictions, num_tokens = allowed_ST.shape
    learned_U = allowed_ST.new_zeros(num_tokens + num_predictions + 1)
    for prediction in range(num_predictions):
        learned_U[1 + prediction : 1 + prediction + num_tokens] |= allowed_ST[prediction]
    return learned_U.nonzero().flatten()
