"""A vocabulary-sharded LM head: argmax and log-sum-exp of every rank's slots from local logits."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.parallel.collectives import gather_objects, gather_rows, max_over, sum_over
from engine.parallel.mesh import Group
from engine.parallel.vocab_shard import VocabShard
from engine.target.head import TargetHead


@dataclass(frozen=True)
class SharedHead:
    """The target's LM head, sharded by vocabulary rows across the ranks of a group.

    own: a head with this rank's rows. own_rows: which rows these are.
    Every method is a collective of the group.
    """

    own: TargetHead
    own_rows: VocabShard

    @property
    def group(self) -> Group:
        return self.own_rows.group

    def rows(self, target_ids_U: Tensor) -> TargetHead:
        """Return the head restricted to `target_ids_U`, int64 [U], on every rank."""
        place_U, own_U = self.own_rows.find(target_ids_U)

        def picked(values: Tensor) -> Tensor:
            mine = values[place_U] * own_U.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
            return sum_over(mine, self.group)

        bias_U = None if self.own.bias_V is None else picked(self.own.bias_V)
        return replace(self.own, weight_VD=picked(self.own.weight_VD), bias_V=bias_U)

    def whole(self) -> TargetHead:
        """Return the head with all rows, on every rank."""
        return self.rows(torch.arange(self.own_rows.total, device=self.own.weight_VD.device))

    def argmax_and_lse(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely token and log-sum-exp over the vocabulary for this rank's slots.

        Shapes: hidden_ND is [N, D]; returns int32 [N] and fp32 [N]. N may differ by rank, or be 0.
        """
        counts_R = gather_objects(len(hidden_ND), self.group)
        if not any(counts_R):
            return hidden_ND.new_empty(0, dtype=torch.int32), hidden_ND.new_empty(0, dtype=torch.float32)
        all_MD = gather_rows(hidden_ND, 0, counts_R, self.group)
        best_M, argmax_M, lse_M = self.own.best_argmax_and_lse(all_MD)
        highest_M = max_over(best_M, self.group)
        mine_M = torch.where(best_M == highest_M, argmax_M + self.own_rows.first, self.own_rows.total)
        first_M = -max_over(-mine_M, self.group)  # of equal logits, the token with the lowest id
        largest_M = max_over(lse_M, self.group)
        lse_M = largest_M + sum_over((lse_M - largest_M).exp(), self.group).log()
        start = sum(counts_R[: self.group.rank])
        own = slice(start, start + len(hidden_ND))
        return first_M[own].to(torch.int32), lse_M[own]
