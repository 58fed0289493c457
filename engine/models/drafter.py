"""Drafters, which propose the tokens that the target verifies, and the replies that they are replayed on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

ROOT = -1  # the parent of nodes that follow the newest committed token


@dataclass(frozen=True)
class DraftSampling:
    """How a drafter draws tokens. The request's top-k and top-p do not apply to drafts, as in servers.

    temperature: divisor of the draft's scores, more than 0.
    seed: of the drafter's own draws, which must be independent of the target's.
    """

    temperature: float
    seed: int


@dataclass(frozen=True)
class DraftDistribution:
    """Distributions from which the tokens of a chain were drawn, each given the tokens before it.

    probability_SK: fp32 [S, K], of the tokens that could be drawn.
    token_SK: int64 [S, K], their ids, which differ within a row; None = a token's column is its id.
    """

    probability_SK: torch.Tensor
    token_SK: torch.Tensor | None = None

    def over(self, vocab_size: int) -> torch.Tensor:
        """Return the probabilities of all tokens, fp32 [S, V]."""
        if self.token_SK is None:
            return self.probability_SK
        zero_SV = self.probability_SK.new_zeros(len(self.token_SK), vocab_size)
        return zero_SV.scatter_(1, self.token_SK, self.probability_SK)


@dataclass(frozen=True)
class TokenTree:
    """Drafted tokens. Each follows another one, its parent, or the newest committed token.

    token_ids: token of each node. Children of one node have different tokens.
    parents: node that each node follows, which comes before it; `ROOT` = the newest committed token.
    drawn_from: distributions of a chain whose tokens were drawn; None = the drafter does not draw tokens.
    """

    token_ids: Sequence[int]
    parents: Sequence[int]
    drawn_from: DraftDistribution | None = field(default=None, compare=False)

    @classmethod
    def chain(cls, token_ids: Sequence[int], drawn_from: DraftDistribution | None = None) -> "TokenTree":
        """Return a tree in which each token follows the one before it."""
        return cls(token_ids, range(ROOT, len(token_ids) + ROOT), drawn_from)

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def is_chain(self) -> bool:
        return all(parent == node + ROOT for node, parent in enumerate(self.parents))

    @cached_property
    def depths(self) -> list[int]:
        """Depth of each node; 1 for those that follow the newest committed token."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    @property
    def depth(self) -> int:
        """Largest depth of a node; 0 without nodes."""
        return max(self.depths, default=0)

    def accepted(self, choice_after: Callable[[int], int | None]) -> list[int]:
        """Return the nodes, from the root on, whose tokens the target chose itself.

        choice_after: maps a node, or `ROOT`, to the token that the target chose after it; None = unknown.
        """
        children = {pair: node for node, pair in enumerate(zip(self.parents, self.token_ids, strict=True))}
        path: list[int] = []
        node: int | None = ROOT
        while node is not None:
            choice = choice_after(node)
            node = None if choice is None else children.get((node, choice))
            if node is not None:
                path.append(node)
        return path


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

    def propose(self) -> TokenTree:
        """Return the tokens that may follow the newest one; possibly none."""
        ...


@dataclass(frozen=True)
class TargetReply:
    """The target's greedy reply to one prompt.

    prompt_ids: token ids of the prompt. token_ids: the reply's, as `plain_decode` returns them.
    aux_TA: [T, A * D] on the host, auxiliary states of all their tokens except the last one.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    aux_TA: torch.Tensor
