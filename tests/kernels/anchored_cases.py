"""Inputs of the attention of draft blocks, for all of its implementations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import BlockRows

ANCHORS = (0, 3, 3, 17, 18, 30)  # context tokens before each block of two documents: the second begins at 15
STARTS = (0, 0, 0, 15, 15, 15)
NUM_CONTEXT = 33  # of which the last three are seen by no block
# What rows see of the context and of their block.
KINDS = ("full", "causal", "window", "causal window", "window of the anchor")
WINDOW = 5


@dataclass(frozen=True)
class BlockCase:
    """Arguments of the attention of draft blocks. leaves: queries, keys and values of the context, and of the blocks."""

    leaves: tuple[Tensor, ...]
    rows: BlockRows

    def picked(self, index_R: Tensor) -> "BlockCase":
        """Return the case with some of the rows as queries; all of them stay keys."""
        query_QHE, *keys = self.leaves
        return BlockCase((query_QHE[index_R], *keys), self.rows.picked(index_R))

    def moved(self, dtype: torch.dtype, device: str = "cpu") -> "BlockCase":
        """Return the case in another precision and place."""
        leaves = tuple(leaf.to(device, dtype) for leaf in self.leaves)
        return BlockCase(leaves, BlockRows(*self.rows.bounds_4Q.to(device).unbind()))


def make_blocks(
    kind: str = "full",
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 10,
    block_size: int = 3,
    anchors: tuple[int, ...] = ANCHORS,
    starts: tuple[int, ...] = STARTS,
    num_context: int = NUM_CONTEXT,
    scale: float = 1.0,
) -> BlockCase:
    """Return blocks of rows at some anchors. kind: one of `KINDS`. heads: (H, G)."""
    g = torch.Generator().manual_seed(0)
    anchor_P = torch.tensor(anchors).repeat_interleave(block_size)
    begin_P = torch.tensor(starts).repeat_interleave(block_size)
    row_P = torch.arange(len(anchor_P))
    offset_P = row_P % block_size
    own_begin_P = row_P - offset_P
    own_end_P = own_begin_P + block_size
    if "causal" in kind:
        own_end_P = row_P + 1
    if "window" in kind:
        earliest_P = anchor_P - WINDOW
        if kind != "window of the anchor":
            earliest_P = earliest_P + offset_P + 1
        begin_P = torch.maximum(begin_P, earliest_P).clamp_max(anchor_P)
        if kind == "causal window":
            own_begin_P = torch.maximum(own_begin_P, row_P - 1)
    num_heads, num_groups = heads
    leaves = [torch.randn(len(row_P), num_heads, head_dim, generator=g) * scale]
    for num_keys in (num_context, num_context, len(row_P), len(row_P)):
        leaves.append(torch.randn(num_keys, num_groups, head_dim, generator=g) * scale)
    return BlockCase(tuple(leaves), BlockRows(begin_P, anchor_P, own_begin_P, own_end_P))


def gradients(attention: Callable[..., Tensor], case: BlockCase, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return the output and the gradients of all leaves for one direction, drawn from a fixed seed."""
    moved = case.moved(dtype, device)
    leaves = [leaf.requires_grad_() for leaf in moved.leaves]
    output_QHE = attention(*leaves, moved.rows)
    direction_QHE = torch.randn(output_QHE.shape, generator=torch.Generator().manual_seed(1)).to(output_QHE)
    grads = torch.autograd.grad((output_QHE * direction_QHE).sum(), leaves)
    return [tensor.detach().cpu() for tensor in (output_QHE, *grads)]
