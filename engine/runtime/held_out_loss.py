"""Measurement of the draft's loss on held-out conversations, with the target wherever training has it."""

from dataclasses import replace

import torch

from engine.batch import MicroBatch
from engine.config.sections import SPLIT, OverlapSection
from engine.data.documents import Documents
from engine.data.packed_loader import PackedLoader
from engine.evaluation.held_out import HeldOutReport, batch_sums, held_out_report
from engine.hidden_states.protocol import Target
from engine.host.telemetry import Telemetry
from engine.models.normaliser import Normaliser
from engine.overlap.step_clock import StepClock
from engine.parallel.zero import ZeroDraft
from engine.runtime.training_loop import Segment
from engine.runtime.training_schedule import Training, TrainingSchedules


class HeldOutLoss:
    """Runs target and draft over packed held-out documents, without gradients.

    The batches are divided over the ranks as those of training are. Target and draft run one after
    the other, except where the target has ranks of its own.
    """

    def __init__(self, zero: ZeroDraft, training: Training, documents: Documents, target: Target, telemetry: Telemetry) -> None:
        """Prepare the measurement.

        documents: held-out documents. target: gives their hidden states.
        """
        self._zero = zero
        self._world = training.world
        self._num_documents = len(documents)
        self._telemetry = telemetry
        config = training.config
        self._loader = PackedLoader.held_out(documents, config, training.ds_config, self._world.rank, self._world.size)
        if config.placement != SPLIT:
            config = replace(config, overlap=OverlapSection(placement="serial"))
        self._loader.check_stream(self._world.decide(lambda: self._loader.stream), self._world.rank, "held-out")
        self._schedules = TrainingSchedules(
            replace(training, config=config),
            self._loader,
            target,
            StepClock(self._world.device),
            telemetry.note,
            is_held_out=True,
        )
        self._normalise = Normaliser(zero.objective, zero.forward, self._world)

    @torch.no_grad()
    def measure(self) -> HeldOutReport | None:
        """Return the results of the current weights, the same on every rank; a collective.

        Returns None if there is nothing to predict: no row is allowed by the mask, or the states of
        all documents are not finite.
        """
        num_steps = self._loader.num_steps
        own = []
        num_left_out: int | torch.Tensor = 0  # on the device, so that no batch waits for it
        with (
            self._schedules.open(Segment(1, num_steps), None) as schedule,
            self._telemetry.progress(num_steps, "batches") as progress,
        ):
            for step in range(1, num_steps + 1):
                ((micro, _),) = schedule.take(step, 1)
                own.append(self._sums(micro))
                num_left_out = num_left_out + micro.num_left_out
                schedule.end_step()
                progress.advance("batches of held-out conversations")
        of_ranks = self._world.gather((torch.stack(own).cpu(), int(num_left_out)))
        sums_BX = torch.cat([sums.reshape(num_steps, -1) for sums, _ in of_ranks])
        left_out = sum(number for _, number in of_ranks)
        if left_out:
            self._telemetry.note(f"  {left_out} held-out documents are left out: the target's states are not finite")
        return held_out_report(sums_BX, self._zero.objective.step_weights, self._num_documents - left_out)

    @property
    def checksum(self) -> int:
        """Checksum of the documents."""
        return self._loader.stream["checksum"]

    def _sums(self, micro: MicroBatch) -> torch.Tensor:
        (norms,) = self._normalise([micro])
        output = self._zero.forward(micro, norms)
        return batch_sums(output, norms.slots, self._zero.objective.loss_share(micro))
