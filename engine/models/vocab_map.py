"""The draft vocabulary: the target tokens that the draft can propose, and the mapping tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class VocabMap:
    """A draft vocabulary of `U` of the target's `V` tokens.

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
        """Return a vocabulary of the tokens `always` and the most frequent others.

        counts_V: int64 [V], occurrences of each token. size: total number of tokens. Ties go to the lower id.
        Raises ValueError if `size` exceeds the target vocabulary or is less than the number of
        tokens in `always`.
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
    def whole(cls, size: int, device: torch.device | str = "cpu") -> "VocabMap":
        """Return the vocabulary that has all `size` tokens of the target."""
        return cls(torch.arange(size, device=device), torch.ones(size, dtype=torch.bool, device=device))

    @classmethod
    def from_tables(cls, d2t: torch.Tensor, t2d: torch.Tensor) -> "VocabMap":
        """Return a checkpoint's vocabulary from its offsets, int64 [U], and flags, bool [V]."""
        return cls(d2t + torch.arange(d2t.numel(), device=d2t.device), t2d)

    @property
    def d2t(self) -> torch.Tensor:
        """Offsets of the target ids, int64 [U]: target id = draft id + d2t[draft id]."""
        return self.target_ids_U - torch.arange(self.target_ids_U.numel(), device=self.target_ids_U.device)

    def draft_ids(self, target_ids_N: torch.Tensor) -> torch.Tensor:
        """Convert target ids [N] to draft ids, int64 [N].

        Tokens outside the draft vocabulary get a valid but meaningless id.
        """
        return torch.searchsorted(self.target_ids_U, target_ids_N.long()).clamp_max(self.size - 1)

    @property
    def size(self) -> int:
        return self.target_ids_U.numel()

    def coverage(self, counts_V: torch.Tensor) -> float:
        """Return the share of counted tokens that are in the draft vocabulary."""
        return (counts_V[self.in_draft_V].sum() / counts_V.sum().clamp_min(1)).item()

    def to(self, device: torch.device) -> "VocabMap":
        return VocabMap(self.target_ids_U.to(device), self.in_draft_V.to(device))
