"""Divisors of the losses, which make the gradient independent of how the global batch is split."""

from collections.abc import Callable
from dataclasses import replace

import torch

from engine.batch import DraftOutput, LossNorms, MicroBatch
from engine.models.draft_method import DraftObjective
from engine.parallel.mesh import World
from engine.parallel.objective import DivisorScope


class Normaliser:
    """Computes the divisors of the losses.

    They count the micro-batches that the objective's `divisor_scope` names. Documents that are left out
    of a micro-batch do not count.
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

        A collective, unless each micro-batch counts alone.
        """
        scope = self._objective.divisor_scope
        counts_MX = torch.stack([self._counts(micro) for micro in micros])
        if scope is not DivisorScope.GLOBAL_BATCH:
            if scope is DivisorScope.RANKS:
                counts_MX = self._world.sum(counts_MX)
            return [_norms(counts_X) for counts_X in counts_MX]
        norms = _norms(self._world.sum(counts_MX.sum(0)))
        if self._objective.needs_acceptance:
            norms = LossNorms(norms.slots, norms.loss_rows_S, self._acceptance(micros, norms))
        return [norms] * len(micros)

    def _counts(self, micro: MicroBatch) -> torch.Tensor:
        """Return what a micro-batch contributes to the divisor, and its rows with loss of each step, fp32 [1 + S]."""
        rows_S = self._objective.count_loss_rows(micro)
        share = rows_S.new_zeros(1) + self._objective.loss_share(micro)
        return torch.cat((share, rows_S))

    @torch.no_grad()
    def _acceptance(self, micros: list[MicroBatch], norms: LossNorms) -> torch.Tensor:
        """Compute the mean acceptance rate of each step over the global batch, fp32 [S].

        This takes an extra forward pass without gradients before the training pass.
        """
        # The acceptance rates do not depend on the weights of the loss, so any value serves here.
        ahead = replace(norms, acceptance_S=torch.zeros_like(norms.loss_rows_S))
        sums_S = torch.stack([self._forward(micro, ahead).accepted_S for micro in micros]).sum(0)
        return self._world.sum(sums_S) / norms.loss_rows_S.clamp_min(1)


def _norms(counts_X: torch.Tensor) -> LossNorms:
    """Return the norms that follow from counts. The divisor is 1 where there is nothing to divide."""
    divisor = counts_X[0]
    return LossNorms(torch.where(divisor > 0, divisor, 1), counts_X[1:])
