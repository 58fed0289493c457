"""The target's token embeddings, whole, or shared by ranks row by row."""

from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from engine.parallel.blocks import look_up_together
from engine.parallel.collectives import gather_objects, gather_rows
from engine.parallel.mesh import Group
from engine.parallel.rules import part_of_rows


@dataclass(frozen=True)
class TargetEmbedding:
    """weight_VD: [V, D]."""

    weight_VD: Tensor

    def rows(self, token_ids_T: Tensor) -> Tensor:
        """int64 [T] -> [T, D]."""
        return F.embedding(token_ids_T, self.weight_VD)

    def whole(self) -> Tensor:
        """[V, D], on every rank."""
        return self.weight_VD


@dataclass(frozen=True)
class SharedEmbedding:
    """weight_VD: rows first .. first + n - 1, of vocab_size in all. Every method is a collective of the group."""

    weight_VD: Tensor
    first: int
    vocab_size: int
    group: Group

    @classmethod
    def of(cls, own_VD: Tensor, vocab_size: int, group: Group) -> "SharedEmbedding":
        """own_VD: the rows that `part_of_rows` gives this rank."""
        return cls(own_VD, part_of_rows(vocab_size, group)[0], vocab_size, group)

    def rows(self, token_ids_T: Tensor) -> Tensor:
        """As `TargetEmbedding.rows`, of own token ids; ranks may bring different numbers of them."""
        counts_R = gather_objects(len(token_ids_T), self.group)
        own = self.first, len(self.weight_VD)
        return look_up_together(partial(F.embedding, weight=self.weight_VD), token_ids_T, counts_R, *own, self.group)

    def whole(self) -> Tensor:
        """[V, D], on every rank."""
        ends = (part_of_rows(self.vocab_size, replace(self.group, rank=rank)) for rank in range(self.group.size))
        return gather_rows(self.weight_VD, 0, [end - first for first, end in ends], self.group)
