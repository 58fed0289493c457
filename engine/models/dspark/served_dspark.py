"""A DSpark draft as a server runs it: tokens are chosen one after the other within a block."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from engine.models.block_drafter.draft_choice import DraftChoice
from engine.models.block_drafter.served_block import ServedBlock
from engine.models.dspark.dspark_draft import DSparkDraft


@dataclass(frozen=True)
class ServedDSpark(ServedBlock):
    """A DSpark draft ready to propose tokens."""

    draws_tokens: ClassVar[bool] = True

    def choose_chunk(self, hidden_NSD: Tensor, newest_N: Tensor, choice: DraftChoice) -> list[list[int]]:
        model = cast(DSparkDraft, self.model)
        head = model.markov_head
        confidence = model.confidence_head
        logits_NSV = self.base_logits(hidden_NSD)
        weight_rV = head.markov_w2.weight.T
        previous_N = newest_N
        state_Nr: Tensor | None = None
        reached_N = torch.ones(len(newest_N), device=newest_N.device)
        length_N = torch.zeros_like(newest_N)
        tokens: list[Tensor] = []
        for step in range(hidden_NSD.shape[1]):
            hidden_ND = hidden_NSD[:, step]
            embed_Nr = head.embed(previous_N)
            factor_Nr, state_Nr = head.step(embed_Nr, hidden_ND, state_Nr)
            if confidence is not None and self.min_confidence:
                reached_N = reached_N * torch.sigmoid(confidence(hidden_ND, embed_Nr).float())
            logits_NV = logits_NSV[:, step] + (factor_Nr @ weight_rV).float()
            previous_N = choice(logits_NV, None)
            tokens.append(previous_N)
            length_N += reached_N >= self.min_confidence
        lengths = length_N.clamp_min(1).tolist()
        return [own[:length] for own, length in zip(torch.stack(tokens, 1).tolist(), lengths, strict=True)]
