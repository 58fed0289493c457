"""A DFlash2 draft as a server runs it: each token is chosen among candidates, given the one before."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from engine.models.block_drafter.served_block import ServedBlock
from engine.models.dflash2.dflash2_draft import DFlash2Draft


@dataclass(frozen=True)
class ServedDFlash2(ServedBlock):
    """A DFlash2 draft ready to propose tokens."""

    def choose_chunk(self, hidden_NSD: Tensor, newest_N: Tensor) -> list[list[int]]:
        model = cast(DFlash2Draft, self.model)
        best = self.base_logits(hidden_NSD).topk(model.config.selector_top_k, dim=-1)
        previous_N = newest_N
        tokens: list[Tensor] = []
        for step in range(hidden_NSD.shape[1]):
            candidate_NK = best.indices[:, step]
            scores_NK = model.candidate_selector.scores(best.values[:, step], candidate_NK, previous_N, hidden_NSD[:, step])
            previous_N = candidate_NK.gather(1, scores_NK.argmax(-1, keepdim=True))[:, 0]
            tokens.append(previous_N)
        return torch.stack(tokens, 1).tolist()
