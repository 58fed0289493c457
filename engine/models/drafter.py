"""Drafters, which propose the tokens that the target verifies, and the replies that they are replayed on."""

from dataclasses import dataclass
from typing import Protocol

import torch


class Drafter(Protocol):
    """Proposer of the tokens that follow the committed ones; it reads only committed tokens."""

    def start(self, token_ids: list[int], aux_TA: torch.Tensor) -> None:
        """Reset the drafter, then read a prompt and the token after it.

        aux_TA: [T, A * D], auxiliary states of all these tokens except the last one.
        """
        ...

    def extend(self, token_ids: list[int], aux_QA: torch.Tensor) -> None:
        """Read `Q` newly committed tokens.

        aux_QA: [Q, A * D], auxiliary states of the positions just before each of them.
        """
        ...

    def propose(self, count: int) -> list[int]:
        """Return at most `count` proposals that follow the newest token; `count` is at least 1."""
        ...


@dataclass(frozen=True)
class TargetReply:
    """The target's greedy reply to one prompt.

    prompt_ids: token ids of the prompt. token_ids: the reply's, as `greedy_decode` returns them.
    aux_TA: [T, A * D] on the host, auxiliary states of all their tokens except the last one.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    aux_TA: torch.Tensor
