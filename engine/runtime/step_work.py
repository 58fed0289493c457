"""Work of a run's optimizer steps, counted from its data before training, for the report to compare with measured times."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.batch import PackedBatch
from engine.config.ds_config import accumulation_steps
from engine.data.packed_loader import PackedLoader
from engine.host.files import write_json
from engine.models.costs import Cost
from engine.models.draft_method import DraftCounts
from engine.overlap.step_clock import BACKWARD, DRAFT_FORWARD, OPTIMIZER, TARGET_FORWARD
from engine.planning.draft_memory import Sharing
from engine.runtime.model_flops import TargetRates
from engine.runtime.training_schedule import Training

COUNTED_BATCHES = 8  # micro-batches that the work is averaged over


@dataclass(frozen=True)
class PieceOfWork:
    """Work of one rank per optimizer step.

    part: the part of `parts_s` in the metrics that it belongs to. bytes: memory traffic, at least.
    dtype: of the operands of its products.
    """

    part: str
    name: str
    flops: float
    bytes: float
    dtype: str


@dataclass(frozen=True)
class StepWork:
    """Least work of an optimizer step on one rank of each side of the job, averaged over some micro-batches.

    device: name of a rank's device. draft_ranks: ranks that train the draft. target_ranks: ranks of
    their own that run the target; 0 = those of the draft run it.
    accumulation: micro-batches per step. tokens: per micro-batch. counted_batches: micro-batches that were averaged.
    pieces: without the target if the job does not run it or it cannot be counted, for the reason in `without_target`.
    """

    device: str
    draft_ranks: int
    target_ranks: int
    accumulation: int
    tokens: float
    counted_batches: int
    pieces: tuple[PieceOfWork, ...]
    without_target: str | None

    @classmethod
    def of(cls, training: Training, loader: PackedLoader, target_ranks: int) -> "StepWork":
        """Count the work from the first micro-batches of rank 0; runs on the host only.

        loader: at the position where the run begins; at least one step must be left.
        target_ranks: as in the fields.
        """
        accumulation = accumulation_steps(training.ds_config, training.world.size)
        num_batches = min(COUNTED_BATCHES, accumulation * loader.num_steps)
        places = [divmod(index, accumulation) for index in range(num_batches)]
        batches = [loader.micro_batch(step, index, training.world.rank) for step, index in places]
        counted = [_counts(training, batch) for batch in batches]
        pieces = list(_draft_pieces(training, counted, accumulation))
        target = training.count_target()
        if target.rates is not None:
            pieces.append(_target_piece(target.rates, counted, accumulation, target_ranks, training.world.size))
        device = training.world.device
        return cls(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            draft_ranks=training.world.size,
            target_ranks=target_ranks,
            accumulation=accumulation,
            tokens=sum(counts.num_tokens for counts in counted) / num_batches,
            counted_batches=num_batches,
            pieces=tuple(pieces),
            without_target=target.problem,
        )

    def write(self, path: Path) -> None:
        """Write the work as JSON. Raises WriteError."""
        content: dict[str, Any] = asdict(self)
        write_json(path, content)


def _counts(training: Training, batch: PackedBatch) -> DraftCounts:
    return training.method.count_work(batch, training.method.allowed_rows(batch))


def _draft_pieces(training: Training, counted: Sequence[DraftCounts], accumulation: int) -> Iterator[PieceOfWork]:
    """Yield the pieces of the draft's forward and backward passes and of its optimizer step."""
    forward: dict[str, Cost] = {}
    backward: dict[str, Cost] = {}
    for counts in counted:
        for name, part in training.method.step_parts(training.draft, counts).items():
            if name != "target_head":  # counted with the target
                forward[name] = forward.get(name, Cost()) + part.forward
                backward[name] = backward.get(name, Cost()) + part.backward
    dtype = _name_of(training.dtype)
    per_step = accumulation / len(counted)
    for part_name, costs in ((DRAFT_FORWARD, forward), (BACKWARD, backward)):
        for name, cost in costs.items():
            if cost != Cost():
                num_bytes = cost.bytes(training.dtype)
                yield PieceOfWork(part_name, name, cost.flops * per_step, num_bytes * per_step, dtype)
    sharing = Sharing.of(training.ds_config, training.world.size)
    is_adam = "adam" in training.ds_config["optimizer"]["type"].lower()
    if is_adam and not sharing.offloads_optimizer:
        moved = sharing.step_traffic(training.method.count_weights(training.draft))
        yield PieceOfWork(OPTIMIZER, "optimizer", 0, moved, "float32")


def _target_piece(
    rates: TargetRates, counted: Sequence[DraftCounts], accumulation: int, target_ranks: int, draft_ranks: int
) -> PieceOfWork:
    """Return the target's forward passes on one rank that runs it."""
    per_step = accumulation / len(counted)
    if target_ranks:  # they prepare the micro-batches of all draft ranks
        per_step *= draft_ranks / target_ranks
    flops = sum(rates.flops(counts) for counts in counted)
    num_bytes = sum(rates.num_bytes(counts) for counts in counted)
    return PieceOfWork(TARGET_FORWARD, "target", flops * per_step, num_bytes * per_step, rates.dtype)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
