"""Divisors of the losses, which make the gradient independent of how the global batch is split."""

from collections.abc import Callable
from dataclasses import replace

import torch

from engine.batch import DraftOutput, LossNorms, MicroBatch
from engine.models.draft_method import DraftObjective
from engine.parallel.mesh import World


class Normaliser:
    """Computes the divisors of the losses.

    If the objective is normalised globally, the divisors are those of the global batch; otherwise
    those of each micro-batch. Documents that are left out of a micro-batch do not count in either case.
    """

    def __init__(
        self, objective: DraftObjective, forward: Callable[[MicroBatch, LossNorms], DraftOutput], world: World
    ) -> None:
        """forward: runs the draft on a micro-batch, for losses that need mean acceptance rates."""
        self._objective = objective
        self._forward = forward
        self._world = world

    def __call__(self, micros: list[MicroBatch]) -> list[LossNorms]:
        """Return the norms of the micro-batches of an optimizer step.

        A collective if the objective is normalised globally.
        """
        rows_per_micro = [self._objective.count_loss_rows(micro) for micro in micros]
        if not self._objective.is_normalised_globally:
            pairs = zip(micros, rows_per_micro, strict=True)
            shares = (rows_S.new_zeros(()) + self._objective.loss_share(micro) for micro, rows_S in pairs)
            return [LossNorms(_positive(share), rows_S) for share, rows_S in zip(shares, rows_per_micro, strict=True)]
        rows_S = torch.stack(rows_per_micro).sum(0)
        share = rows_S.new_zeros(1) + sum(self._objective.loss_share(micro) for micro in micros)
        totals = self._world.sum(torch.cat((share, rows_S)))
        norms = LossNorms(_positive(totals[0]), totals[1:])
        if self._objective.needs_acceptance:
            norms = LossNorms(norms.slots, norms.loss_rows_S, self._acceptance(micros, norms))
        return [norms] * len(micros)

    @torch.no_grad()
    def _acceptance(self, micros: list[MicroBatch], norms: LossNorms) -> torch.Tensor:
        """Compute the mean acceptance rate of each step over the global batch, fp32 [S].

        This takes an extra forward pass without gradients before the training pass.
        """
        # The acceptance rates do not depend on the weights of the loss, so any value serves here.
        ahead = replace(norms, acceptance_S=torch.zeros_like(norms.loss_rows_S))
        sums_S = torch.stack([self._forward(micro, ahead).accepted_S for micro in micros]).sum(0)
        return self._world.sum(sums_S) / norms.loss_rows_S.clamp_min(1)


def _positive(divisor: torch.Tensor) -> torch.Tensor:
    """Return a divisor, or 1 where there is nothing to divide."""
    return torch.where(divisor > 0, divisor, 1)
