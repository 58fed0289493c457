"""Anchors: the positions at which the blocks of a document start in training.

An anchor `a` is the position of the last token that the target itself has produced. Its block drafts
the tokens after it. Row `(t, i)` of the data model belongs to the anchor `a = t + 1`: it learns slot
`u = t + 1 + i = a + i`, whose label is the token `x[u + 1]`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from engine.batch import PackedBatch
from engine.config.sections import TttSection
from engine.models.training_rows import allowed_rows


@dataclass(frozen=True)
class AnchorRule:
    """Which rows may learn, and how anchors are drawn among the positions that have such a row.

    num_predictions: tokens S that a block drafts.
    share: anchors per token of a document, or per position that can have one; None = all positions are anchors.
    share_of: of which of these it is the share.
    is_sweep: whether the epochs take different anchors until all were taken.
    seed: of the draws.
    needs_prefix: whether a row learns only if all rows before it in its block do, as when serving.
    stays_in_document: whether labels lie in the document of their anchor.
    needs_next: whether the token after an anchor must be an assistant token, as well as the anchor itself.
    room_in_document, room_in_pack: tokens from an anchor on that must exist in its document, or its pack.
    reads_mask_before_label: whether a row learns if the token before its label is an assistant token.
    """

    num_predictions: int
    share: float | None = None
    share_of: Literal["tokens", "positions"] = "tokens"
    is_sweep: bool = False
    seed: int = 0
    needs_prefix: bool = True
    stays_in_document: bool = True
    needs_next: bool = True
    room_in_document: int = 0
    room_in_pack: int = 0
    reads_mask_before_label: bool = False

    def rows(self, batch: PackedBatch) -> torch.Tensor:
        """Return the rows that the drawn blocks learn, bool [S, T]; `batch` must be on the host.

        The draw of a document depends on the seed, the epoch and the document alone, so it is the
        same in every packing and on any number of ranks.
        """
        possible_ST = self.possible_rows(batch)
        if self.share is None:
            return possible_ST
        return possible_ST & torch.from_numpy(self._drawn(batch, possible_ST.any(0).numpy()))

    def possible_rows(self, batch: PackedBatch) -> torch.Tensor:
        """Return the rows that blocks at all positions would learn, bool [S, T]."""
        if self.needs_prefix and self.stays_in_document:
            return allowed_rows(batch, TttSection(steps=self.num_predictions))
        mask_T = batch.assistant_mask_T
        num_tokens = batch.num_tokens
        position_T = torch.arange(num_tokens, device=mask_T.device)
        end_T = torch.repeat_interleave(batch.cu_seqlens[1:].long(), batch.lengths.long(), output_size=num_tokens)
        anchors_T = _at(mask_T, position_T + 1) & (position_T + 1 < end_T)
        if self.needs_next:
            anchors_T &= _at(mask_T, position_T + 2) & (position_T + 2 < end_T)
        anchors_T &= position_T + 1 + self.room_in_document <= end_T
        anchors_T &= position_T + 1 + self.room_in_pack <= num_tokens
        limit_T = end_T if self.stays_in_document else torch.full_like(end_T, num_tokens)
        rows = []
        for prediction in range(self.num_predictions):
            label_T = position_T + 2 + prediction
            read_T = label_T - 1 if self.reads_mask_before_label else label_T
            rows.append(anchors_T & (label_T < limit_T) & _at(mask_T, read_T))
        rows_ST = torch.stack(rows)
        return rows_ST.cummin(0).values if self.needs_prefix else rows_ST

    def _drawn(self, batch: PackedBatch, possible_T: np.ndarray) -> np.ndarray:
        """Return which positions have a drawn anchor after them, bool [T]."""
        assert self.share is not None
        drawn_T = np.zeros_like(possible_T)
        documents = batch.document_ids or range(len(batch.host_lengths))
        epochs = batch.document_epochs or (0,) * len(batch.host_lengths)
        start = 0
        for document, epoch, length in zip(documents, epochs, batch.host_lengths, strict=True):
            candidates = start + np.flatnonzero(possible_T[start : start + length])
            if len(candidates):
                counted = length if self.share_of == "tokens" else len(candidates)
                chosen = self._choose(len(candidates), self.share * counted, document, epoch)
                drawn_T[candidates[chosen]] = True
            start += length
        return drawn_T

    def _choose(self, num_candidates: int, wanted: float, document: int, epoch: int) -> np.ndarray:
        """Return indices of the candidates that are drawn, without repeats.

        wanted: number of anchors on average; its fraction is rounded up at random.
        """
        if not self.is_sweep:
            generator = np.random.default_rng([self.seed, document, epoch])
            count = min(num_candidates, math.floor(wanted + generator.random()))
            return generator.choice(num_candidates, count, replace=False)
        generator = np.random.default_rng([self.seed, document])
        order = generator.permutation(num_candidates)
        phase = generator.random()  # which spreads the anchors of short documents over the epochs
        wanted = min(wanted, num_candidates)
        first = math.floor(epoch * wanted + phase)
        end = math.floor((epoch + 1) * wanted + phase)
        return order[np.arange(first, end) % num_candidates]


def _at(mask_T: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
    """Return the mask at other positions, false behind the end."""
    return torch.nn.functional.pad(mask_T, (0, int(position_T.max()) + 1 - len(mask_T)))[position_T]
