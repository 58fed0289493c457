"""A rank's rows of a table that a group shares, such as an embedding or a head, and looking rows up in all of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.parallel.collectives import gather_rows, sum_rows
from engine.parallel.mesh import Group
from engine.parallel.rules import part_of_rows


@dataclass(frozen=True)
class VocabShard:
    """total: rows of the whole table, of which this rank holds `part_of_rows`."""

    total: int
    group: Group

    @property
    def first(self) -> int:
        return part_of_rows(self.total, self.group)[0]

    @property
    def counts_R(self) -> list[int]:
        """Rows by rank."""
        parts = (part_of_rows(self.total, replace(self.group, rank=rank)) for rank in range(self.group.size))
        return [end - first for first, end in parts]

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where rows lie among own ones, 0 where another rank holds them; and whether they are own."""
        first, end = part_of_rows(self.total, self.group)
        is_own = (ids >= first) & (ids < end)
        return torch.where(is_own, ids - first, 0), is_own

    def look_up(self, look_up_own: Callable[[Tensor], Tensor], ids_T: Tensor, counts_R: Sequence[int]) -> Tensor:
        """Rows [..., T, D] of own ids [..., T], from the ranks that hold them; a collective of the group.

        look_up_own: among own rows. counts_R: ids by rank.
        """
        place_M, is_own_M = self.find(gather_rows(ids_T, -1, counts_R, self.group))
        return sum_rows(look_up_own(place_M).masked_fill(~is_own_M[..., None], 0), -2, counts_R, self.group)
