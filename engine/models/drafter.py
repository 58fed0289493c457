"""Drafters, which propose the tokens that the target verifies, and the replies that they are replayed on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

ROOT = -1  # the parent of nodes that follow the newest committed token


@dataclass(frozen=True)
class TokenTree:
    """Drafted tokens. Each follows another one, its parent, or the newest committed token.

    token_ids: token of each node. Children of one node have different tokens.
    parents: node that each node follows, which comes before it; `ROOT` = the newest committed token.
    """

    token_ids: Sequence[int]
    parents: Sequence[int]

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> "TokenTree":
        """Return a tree in which each token follows the one before it."""
        return cls(token_ids, range(ROOT, len(token_ids) + ROOT))

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
