"""Work of a run's optimizer steps, counted from its data before training, for the report to compare with measured times."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.batch import PackedBatch
from engine.config.ds_config import accumulation_steps
from engine.config.sections import Config
from engine.data.packed_loader import PackedLoader
from engine.host.files import write_json
from engine.models.costs import Cost
from engine.models.draft_method import DraftCounts
from engine.overlap.step_clock import BACKWARD, DRAFT_FORWARD, OPTIMIZER, TARGET_FORWARD
from engine.parallel.mesh import Group, TargetMesh
from engine.planning.draft_memory import Sharing
from engine.planning.target_cost import Forward, TargetCost
from engine.runtime.training_schedule import Training
from engine.target.configuration import load_target_config
from engine.target.structure import without_weights
from engine.weights.quantised_checkpoint import StaysQuantised, forget_quantisation

COUNTED_BATCHES = 8  # micro-batches that the work is averaged over
FP8 = "float8_e4m3fn"


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
    pieces: without the target if it does not run in this job or is unknown, for the reason in `without_target`.
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
    def of(cls, training: Training, loader: PackedLoader, target_ranks: int, runs_target: bool) -> "StepWork":
        """Count the work from the first micro-batches of rank 0; runs on the host only.

        loader: at the position where the run begins; at least one step must be left.
        target_ranks: as in the fields. runs_target: whether the job runs the target.
        """
        accumulation = accumulation_steps(training.ds_config, training.world.size)
        num_batches = min(COUNTED_BATCHES, accumulation * loader.num_steps)
        places = [divmod(index, accumulation) for index in range(num_batches)]
        batches = [loader.micro_batch(step, index, training.world.rank) for step, index in places]
        counted = [_counts(training, batch) for batch in batches]
        pieces = list(_draft_pieces(training, counted, accumulation))
        without_target = None if runs_target else "this job does not run the target"
        if runs_target:
            try:
                pieces.append(_target_piece(training, counted, accumulation))
            except Exception as error:  # a family that only its own code can build must not end the run
                without_target = f"its work cannot be counted ({type(error).__name__}: {error})"
        device = training.world.device
        return cls(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            draft_ranks=training.world.size,
            target_ranks=target_ranks,
            accumulation=accumulation,
            tokens=sum(counts.num_tokens for counts in counted) / num_batches,
            counted_batches=num_batches,
            pieces=tuple(pieces),
            without_target=without_target,
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


def _target_piece(training: Training, counted: Sequence[DraftCounts], accumulation: int) -> PieceOfWork:
    """Return the target's forward passes. Raises an error of any kind for a target that cannot be built without weights."""
    config = training.config
    cost = _target_cost(config, training.world.device)
    per_step = accumulation / len(counted)
    flops = 0.0
    num_bytes = 0
    for counts in counted:
        forward = Forward(counts.num_tokens, counts.num_slots, counts.prefix_pairs)
        flops += cost.flops(forward)
        num_bytes += cost.least_bytes(forward, len(training.draft.aux_layers or ()))
    dtype = FP8 if config.target.fp8_activations else _name_of(cost.model.dtype)
    return PieceOfWork(TARGET_FORWARD, "target", flops * per_step, num_bytes * per_step, dtype)


def _target_cost(config: Config, device: torch.device) -> TargetCost:
    target_config = load_target_config(config.target)
    quantised = StaysQuantised.of(target_config, config.target.keep_quantised, config.target.fp8_activations)
    forget_quantisation(target_config)
    model = without_weights(target_config, config.target, device)
    mesh = TargetMesh(Group(config.parallel.tp_size, 0), Group(config.parallel.ep_size, 0))
    return TargetCost(model, mesh, quantised)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
