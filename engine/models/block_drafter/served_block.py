"""A block drafter as a server runs it: with the target's embedding and head."""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from engine.batch import MicroBatch
from engine.config.tree_shape import TreeShape
from engine.kernels.interface import FrozenHead
from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_probe import head_logits, probe_logits, shape_of
from engine.models.block_drafter.block_proposer import BlockProposer, propose_along
from engine.models.block_drafter.block_rows import BlockShape
from engine.models.block_drafter.draft_choice import DraftChoice, most_likely
from engine.models.draft_method import ServedDraft
from engine.models.drafter import Drafter, DraftSampling, TargetReply

LOGIT_BYTES = 64 << 20  # of a chunk of rows


@dataclass(frozen=True)
class ServedBlock(ServedDraft):
    """A block drafter ready to propose tokens.

    draws_tokens: whether servers draw the drafted tokens of sampled replies.
    embed_weight_VD: the target's embedding, in the draft's precision. head: the target's LM head.
    min_confidence: drafted tokens end where the estimated probability that all are accepted falls below
        it; 0 = never. Only methods with a confidence head estimate it.
    """

    draws_tokens: ClassVar[bool] = False

    model: BlockDraft
    embed_weight_VD: Tensor
    head: FrozenHead
    min_confidence: float = 0.0

    @property
    def first_drafting_row(self) -> int:
        """Index of the first row of a block that drafts a token."""
        config = self.model.config
        return config.block_size - config.num_predictions

    @property
    def block_shape(self) -> BlockShape:
        return shape_of(self.model)

    def to(self, dtype: torch.dtype) -> "ServedBlock":
        """Return a copy that computes in `dtype`; the head keeps its own."""
        return replace(self, model=copy.deepcopy(self.model).to(dtype), embed_weight_VD=self.embed_weight_VD.to(dtype))

    def drafter(self, shape: TreeShape) -> Drafter:
        """Return a new drafter for one prompt."""
        return BlockProposer(self, shape)

    def sampling_drafter(self, shape: TreeShape, sampling: DraftSampling) -> Drafter:
        """Return a new drafter for one prompt whose reply is sampled."""
        return BlockProposer(self, shape, sampling if self.draws_tokens else None)

    def propose_along(self, replies: Sequence[TargetReply], shape: TreeShape, max_tokens: int) -> Sequence[Drafter]:
        """Return one drafter per reply, which drafts from all of its tokens at once."""
        return propose_along(self, replies, shape.num_steps, max_tokens)

    @torch.no_grad()
    def logits(self, micro: MicroBatch) -> Tensor:
        """Compute the logits of some blocks spread over the batch, [S, N, V], from the draft's own embedding table."""
        embed_TD = self.embed_weight_VD[micro.batch.input_ids_T]
        return probe_logits(self.model, self.head, micro, embed_TD)

    def base_logits(self, hidden_QD: Tensor) -> Tensor:
        """Return the logits of rows before a method changes them, fp32 [..., V]."""
        return head_logits(self.head, hidden_QD)

    def chunks(self, hidden_NSD: Tensor) -> Iterator[slice]:
        """Yield blocks whose logits are computed together."""
        num_blocks, num_tokens, _ = hidden_NSD.shape
        size = max(1, LOGIT_BYTES // (4 * num_tokens * len(self.head.weight_VD)))
        for first in range(0, num_blocks, size):
            yield slice(first, min(first + size, num_blocks))

    def choose(self, hidden_NSD: Tensor, newest_N: Tensor, choice: DraftChoice = most_likely) -> list[list[int]]:
        """Return the drafted tokens of each block.

        hidden_NSD: final states of the rows that draft. newest_N: int64, the newest committed token of each block.
        choice: called once per drafted token of a block, in order.
        """
        chains: list[list[int]] = []
        for chunk in self.chunks(hidden_NSD):
            chains += self.choose_chunk(hidden_NSD[chunk], newest_N[chunk], choice)
        return chains

    @abstractmethod
    def choose_chunk(self, hidden_NSD: Tensor, newest_N: Tensor, choice: DraftChoice) -> list[list[int]]:
        """Return the drafted tokens of a few blocks, as `choose` does."""


class ServedIndependent(ServedBlock):
    """A draft whose tokens are chosen independently of each other: DFlash."""

    def choose_chunk(self, hidden_NSD: Tensor, newest_N: Tensor, choice: DraftChoice) -> list[list[int]]:
        tokens = [choice(logits_NV, None) for logits_NV in self.base_logits(hidden_NSD).unbind(1)]
        return torch.stack(tokens, 1).tolist()
