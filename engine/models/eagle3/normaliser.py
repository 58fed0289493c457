"""What losses are divided by, so that a gradient does not depend on how the global batch was cut."""

from collections.abc import Callable
from dataclasses import replace

import torch

from engine.batch import DraftOutput, LossNorms, MicroBatch
from engine.models.eagle3.training_rows import loss_rows
from engine.models.eagle3.unroll import TrainingTimeTest
from engine.parallel.mesh import World


class Normaliser:
    """`positions`: positions of the micro-batch, LK means over its own rows. `slots`: slots and rows of the global batch.

    Documents that are left out of a micro-batch count in neither.
    """

    def __init__(self, test: TrainingTimeTest, forward: Callable[[MicroBatch, LossNorms], DraftOutput], world: World) -> None:
        """forward: runs the draft on a micro-batch, for losses that need mean acceptance rates."""
        self._test = test
        self._forward = forward
        self._world = world

    def __call__(self, micros: list[MicroBatch]) -> list[LossNorms]:
        """Norms of the micro-batches of one optimizer step; under `slots` a collective."""
        rows_per_micro = [self._loss_rows(micro) for micro in micros]
        if self._test.loss.normaliser == "positions":
            pairs = zip(micros, rows_per_micro, strict=True)
            return [LossNorms((rows_S.new_zeros(()) + micro.num_tokens).clamp_min(1), rows_S) for micro, rows_S in pairs]
        rows_S = torch.stack(rows_per_micro).sum(0)
        num_slots = rows_S.new_zeros(1) + sum(micro.num_slots for micro in micros)
        totals = self._world.sum(torch.cat((num_slots, rows_S)))
        norms = LossNorms(totals[0].clamp_min(1), totals[1:])
        if self._test.distillation.needs_acceptance:
            norms = LossNorms(norms.slots, norms.loss_rows_S, self._acceptance(micros, norms))
        return [norms] * len(micros)

    def _loss_rows(self, micro: MicroBatch) -> torch.Tensor:
        return loss_rows(micro.allowed_ST, micro.target, self._test.teacher.vocab_map).sum(1).float()

    @torch.no_grad()
    def _acceptance(self, micros: list[MicroBatch], norms: LossNorms) -> torch.Tensor:
        """Mean acceptance rate of each step over the global batch, fp32 [S]: a forward ahead of the one that trains."""
        ahead = replace(norms, acceptance_S=torch.zeros_like(norms.loss_rows_S))  # acceptance does not depend on how losses mix
        sums_S = torch.stack([self._forward(micro, ahead).accepted_S for micro in micros]).sum(0)
        return self._world.sum(sums_S) / norms.loss_rows_S.clamp_min(1)
