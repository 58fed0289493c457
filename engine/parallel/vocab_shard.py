"""Row-wise shards of a vocabulary table (an embedding or a head), and lookups in all of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.parallel.collectives import gather_rows, sum_rows
from engine.parallel.mesh import Group
from engine.parallel.rules import part_of_rows


@dataclass(frozen=True)
class VocabShard:
    """A rank's rows of a table that a group shares: the interval `part_of_rows(total, group)`.

    total: rows of the whole table.
    """

    total: int
    group: Group

    @property
    def first(self) -> int:
        return part_of_rows(self.total, self.group)[0]

    @property
    def counts_R(self) -> list[int]:
        """Number of rows of each rank."""
        parts = (part_of_rows(self.total, replace(self.group, rank=rank)) for rank in range(self.group.size))
        return [end - first for first, end in parts]

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the local index of each id, and whether this rank holds the id.

        The index is 0 for ids of other ranks.
        """
        first, end = part_of_rows(self.total, self.group)
        is_own = (ids >= first) & (ids < end)
        return torch.where(is_own, ids - first, 0), is_own

    def look_up(self, look_up_own: Callable[[Tensor], Tensor], ids_T: Tensor, counts_R: Sequence[int]) -> Tensor:
        """Return the rows [..., T, D] of this rank's ids [..., T]; a collective of the group.

        look_up_own: maps local indices to rows.
        counts_R: number of ids of each rank.
        """
        place_M, is_own_M = self.find(gather_rows(ids_T, -1, counts_R, self.group))
        return sum_rows(look_up_own(place_M).masked_fill(~is_own_M[..., None], 0), -2, counts_R, self.group)
