"""FLOPs of training steps in relation to the peak rate of the device: model FLOP utilisation (MFU).

The FLOPs are those of the formulas with which a job is planned: of the draft's forward and backward on
the rows that the mask allows, and of the target's forward if the target runs on the same ranks.
Recomputed activations and rows that run as padding are not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import PackedBatch
from engine.config.sections import Config
from engine.models.draft_method import DraftConfig, DraftCounts, DraftMethod
from engine.parallel.mesh import Group, TargetMesh
from engine.planning.target_cost import Forward, TargetCost
from engine.target.configuration import load_target_config
from engine.target.structure import without_weights
from engine.weights.quantised_checkpoint import StaysQuantised, forget_quantisation

FP8 = "float8_e4m3fn"
ELSEWHERE = "this job does not run the target"


@dataclass(frozen=True)
class TargetRates:
    """Work of a target's forward on one rank.

    FLOPs grow with the tokens, the slots that the head reads, and the pairs of query and key; bytes of
    memory traffic with the tokens and the slots, in addition to those of every forward.
    dtype: name of the operands' dtype.
    """

    flops_per_token: float
    flops_per_slot: float
    flops_per_pair: float
    bytes_per_forward: float
    bytes_per_token: float
    bytes_per_slot: float
    dtype: str

    @classmethod
    def of(cls, cost: TargetCost, num_aux: int, dtype: str | None = None) -> "TargetRates":
        """Return the rates of a target. num_aux: auxiliary layers. dtype: None = that of the model."""
        token, slot, pair = Forward(1, 0, 0), Forward(0, 1, 0), Forward(0, 0, 1)
        every = cost.least_bytes(Forward(0, 0, 0), num_aux)
        return cls(
            flops_per_token=cost.flops(token),
            flops_per_slot=cost.flops(slot),
            flops_per_pair=cost.flops(pair),
            bytes_per_forward=every,
            bytes_per_token=cost.least_bytes(token, num_aux) - every,
            bytes_per_slot=cost.least_bytes(slot, num_aux) - every,
            dtype=dtype or str(cost.model.dtype).removeprefix("torch."),
        )

    @classmethod
    def read(cls, config: Config, device: torch.device, num_aux: int, runs_head: bool) -> "TargetRates":
        """Return the rates of the target of a recipe, from the target's config alone.

        num_aux: number of auxiliary layers. runs_head: whether a forward multiplies the slots by the head.
        Raises an error of any kind for a target that cannot be built without weights.
        """
        section = config.target
        target_config = load_target_config(section)
        quantised = StaysQuantised.of(target_config, section.keep_quantised, section.fp8_activations)
        forget_quantisation(target_config)
        mesh = TargetMesh(Group(config.parallel.tp_size, 0), Group(config.parallel.ep_size, 0))
        cost = TargetCost(without_weights(target_config, section, device), mesh, quantised, runs_head)
        return cls.of(cost, num_aux, FP8 if section.fp8_activations else None)

    def flops(self, counts: DraftCounts) -> float:
        of_tokens = self.flops_per_token * counts.num_tokens + self.flops_per_slot * counts.num_slots
        return of_tokens + self.flops_per_pair * counts.prefix_pairs

    def num_bytes(self, counts: DraftCounts) -> float:
        of_tokens = self.bytes_per_token * counts.num_tokens + self.bytes_per_slot * counts.num_slots
        return self.bytes_per_forward + of_tokens


@dataclass(frozen=True)
class CountedTarget:
    """Work of the target of a job. rates: None = not counted, for the reason in `problem`."""

    rates: TargetRates | None
    problem: str | None = None

    @classmethod
    def read(cls, config: Config, device: torch.device, num_aux: int, runs_head: bool = True) -> "CountedTarget":
        """Count the target of a recipe, on a rank that runs it.

        num_aux: number of auxiliary layers. runs_head: whether a forward multiplies the slots by the head.
        """
        try:
            return cls(TargetRates.read(config, device, num_aux, runs_head))
        except Exception as error:  # code of a checkpoint may fail in any way without weights, which must not end the run
            return cls(None, f"its work cannot be counted ({type(error).__name__}: {error})")


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
        note: Callable[[str], None],
        target: TargetRates | None = None,
        target_flops_per_s: float = 1.0,
    ) -> None:
        """Create it. note: writes a line to the log. target: None = the target does not run on these ranks."""
        self._method = method
        self._draft = draft
        self._flops_per_s = flops_per_s
        self._note = note
        self._target = target
        self._target_flops_per_s = target_flops_per_s
        self._has_failed = False

    def __call__(self, batch: PackedBatch, allowed_ST: Tensor) -> float | None:
        """Return the seconds; None = unknown, once the draft method has failed to count.

        batch, allowed_ST: on the host, from `DraftMethod.allowed_rows`.
        """
        if self._has_failed:
            return None
        try:
            return self._seconds(batch, allowed_ST)
        except Exception as error:  # a draft method of a plugin may count wrongly, which must not end the run
            self._has_failed = True
            self._note(f"  no MFU: {self._method.title} cannot count its work ({type(error).__name__}: {error})")
            return None

    def _seconds(self, batch: PackedBatch, allowed_ST: Tensor) -> float:
        counts = self._method.count_work(batch, allowed_ST)
        seconds = self._method.step_flops(self._draft, counts) / self._flops_per_s
        if self._target is not None:
            seconds += self._target.flops(counts) / self._target_flops_per_s
        return seconds
