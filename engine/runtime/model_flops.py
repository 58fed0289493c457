"""FLOPs of training steps in relation to the peak rate of the device: model FLOP utilisation (MFU).

The FLOPs are those of the formulas with which a job is planned: of the draft's forward and backward on
the rows that the mask allows, and of the target's forward if the target runs on the same ranks.
They do not depend on how a step computes them; recomputed activations and rows that run as padding
count as nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import PackedBatch
from engine.config.sections import TargetSection
from engine.models.draft_method import DraftConfig, DraftCounts, DraftMethod
from engine.parallel.mesh import ALONE
from engine.planning.target_cost import Forward, TargetCost
from engine.target.configuration import load_target_config
from engine.target.structure import without_weights
from engine.weights.quantised_checkpoint import forget_quantisation


@dataclass(frozen=True)
class TargetRates:
    """FLOPs of a target's forward per token, per slot that its head reads, and per pair of query and key."""

    per_token: float
    per_slot: float
    per_pair: float

    @classmethod
    def of(cls, cost: TargetCost) -> "TargetRates":
        return cls(cost.flops(Forward(1, 0, 0)), cost.flops(Forward(0, 1, 0)), cost.flops(Forward(0, 0, 1)))

    @classmethod
    def read(cls, section: TargetSection, device: torch.device) -> "TargetRates":
        """Return the rates of the target of a recipe, from its config alone."""
        config = load_target_config(section)
        forget_quantisation(config)
        return cls.of(TargetCost(without_weights(config, section, device), ALONE))

    def flops(self, counts: DraftCounts) -> float:
        return self.per_token * counts.num_tokens + self.per_slot * counts.num_slots + self.per_pair * counts.prefix_pairs


class PeakSeconds:
    """Seconds that the work of a micro-batch would take at the peak rates of the device.

    Each side counts at the peak of its own precision. Their sum over the ranks, divided by the time of
    the step and the number of ranks, is the MFU.
    """

    def __init__(
        self,
        method: DraftMethod,
        draft: DraftConfig,
        flops_per_s: float,
        target: TargetRates | None = None,
        target_flops_per_s: float = 1.0,
    ) -> None:
        """Create it. target: None = the target does not run on these ranks."""
        self._method = method
        self._draft = draft
        self._flops_per_s = flops_per_s
        self._target = target
        self._target_flops_per_s = target_flops_per_s

    def __call__(self, batch: PackedBatch, allowed_ST: Tensor) -> float:
        """Return the seconds. batch, allowed_ST: on the host, from `DraftMethod.allowed_rows`."""
        counts = self._method.count_work(batch, allowed_ST)
        seconds = self._method.step_flops(self._draft, counts) / self._flops_per_s
        if self._target is not None:
            seconds += self._target.flops(counts) / self._target_flops_per_s
        return seconds
