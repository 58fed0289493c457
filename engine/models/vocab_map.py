"""The draft vocabulary: which target tokens the draft can propose, and the two tables that map between the vocabularies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class VocabMap:
    """A draft vocabulary of `U` target tokens out of `V`.

    target_ids_U: int64 [U], ascending target ids; draft id `k` is target id `target_ids_U[k]`.
    in_draft_V: bool [V], whether a target token is in the draft vocabulary.
    """

    target_ids_U: torch.Tensor
    in_draft_V: torch.Tensor

    def __post_init__(self) -> None:
        if not torch.equal(self.in_draft_V.nonzero().flatten(), self.target_ids_U):
            raise ValueError("t2d and d2t describe different draft vocabularies: nonzero(t2d) must equal d2t + arange(U)")

    @classmethod
    def most_frequent(cls, counts_V: torch.Tensor, size: int, always: Sequence[int] = ()) -> "VocabMap":
        """Target tokens `always` and the most frequent others, `size` in all; ties go to the lower id. counts_V: int64 [V].

        Raises ValueError if `size` exceeds the target vocabulary, or is less than `always` needs.
        """
        always = sorted({token for token in always if token < counts_V.numel()})
        if size < len(always):
            raise ValueError(f"draft.vocab_size={size} is less than the template's {len(always)} special tokens; use more")
        if size > counts_V.numel():
            raise ValueError(f"draft.vocab_size={size} exceeds the target's vocabulary of {counts_V.numel()}; use at most that")
        ranks_V = counts_V.clone()
        ranks_V[always] = torch.iinfo(torch.int64).max
        order_V = torch.sort(ranks_V, descending=True, stable=True).indices
        in_draft_V = torch.zeros(counts_V.numel(), dtype=torch.bool)
        in_draft_V[order_V[:size]] = True
        return cls(in_draft_V.nonzero().flatten(), in_draft_V)

    @classmethod
    def from_tables(cls, d2t: torch.Tensor, t2d: torch.Tensor) -> "VocabMap":
        """From a checkpoint's offsets `d2t` int64 [U] and flags `t2d` bool [V]."""
        return cls(d2t + torch.arange(d2t.numel(), device=d2t.device), t2d)

    @property
    def d2t(self) -> torch.Tensor:
        """Offsets int64 [U]: target id = draft id + d2t[draft id]."""
        return self.target_ids_U - torch.arange(self.target_ids_U.numel(), device=self.target_ids_U.device)

    def draft_ids(self, target_ids_N: torch.Tensor) -> torch.Tensor:
        """Target ids [N] -> int64 [N] draft ids; meaningless, but valid, for tokens outside the draft vocabulary."""
        return torch.searchsorted(self.target_ids_U, target_ids_N.long()).clamp_max(self.size - 1)

    @property
    def size(self) -> int:
        return self.target_ids_U.numel()

    def coverage(self, counts_V: torch.Tensor) -> float:
        """Share of counted tokens that the draft vocabulary holds."""
        return (counts_V[self.in_draft_V].sum() / counts_V.sum().clamp_min(1)).item()

    def to(self, device: torch.device) -> "VocabMap":
        return VocabMap(self.target_ids_U.to(device), self.in_draft_V.to(device))
