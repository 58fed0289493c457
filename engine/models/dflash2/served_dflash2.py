"""A DFlash2 draft as a server runs it: each token is chosen among candidates, given the one before."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from engine.models.block_drafter.draft_choice import DraftChoice
from engine.models.block_drafter.served_block import ServedBlock
from engine.models.dflash2.dflash2_draft import DFlash2Draft


@dataclass(frozen=True)
class ServedDFlash2(ServedBlock):
    """A DFlash2 draft ready to propose tokens."""

    draws_tokens: ClassVar[bool] = True

    def choose_chunk(self, hidden_NSD: Tensor, newest_N: Tensor, choice: DraftChoice) -> list[list[int]]:
        model = cast(DFlash2Draft, self.model)
        best = self.base_logits(hidden_NSD).topk(model.config.selector_top_k, dim=-1)
        previous_N = newest_N
        tokens: list[Tensor] = []
        for step in range(hidden_NSD.shape[1]):
            candidate_NK = best.indices[:, step]
            scores_NK = model.candidate_selector.scores(best.values[:, step], candidate_NK, previous_N, hidden_NSD[:, step])
            previous_N = choice(scores_NK, candidate_NK)
            tokens.append(previous_N)
        return torch.stack(tokens, 1).tolist()
