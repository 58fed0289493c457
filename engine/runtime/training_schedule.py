"""The schedule of a training run, made from its recipe."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from engine.batch import MicroBatch, PackedBatch, to_device
from engine.config.ds_config import compute_dtype, micro_batch_size
from engine.config.sections import AUTO, SERIAL, SPLIT, Config, ConfigError
from engine.data.packed_loader import PackedLoader
from engine.hidden_states.micro_batches import MicroBatchMaker, Rows
from engine.hidden_states.protocol import Target
from engine.hidden_states.remote_target import RemoteTarget
from engine.hidden_states.wire import WireFormat, WireStates
from engine.models.costs import peak_of
from engine.models.draft_method import DraftConfig, DraftMethod
from engine.overlap.bridge import Sides
from engine.overlap.pipeline import Producer
from engine.overlap.schedule import Schedule, Side, limits_of
from engine.overlap.split_pipeline import SplitPipeline
from engine.overlap.step_clock import StepClock
from engine.overlap.streams import size_of
from engine.parallel.mesh import World
from engine.runtime.checkpoint import DataState
from engine.runtime.model_flops import ELSEWHERE, CountedTarget, PeakSeconds
from engine.runtime.target_server import Served
from engine.runtime.training_loop import Segment
from engine.target.frozen import FrozenTarget

Item = tuple[PackedBatch, DataState]
Work = tuple[MicroBatch, DataState]  # a micro-batch, and the state for resuming after its step


@dataclass(frozen=True)
class Training:
    """What a schedule needs to know of a run.

    ds_config: DeepSpeed's configuration. draft: of the draft. dtype: precision in which it computes.
    num_predictions: its predictions per position.
    count_target: returns the work of the target, which is counted at the first call.
    """

    config: Config
    ds_config: dict[str, Any]
    world: World
    method: DraftMethod
    draft: DraftConfig
    dtype: torch.dtype
    num_predictions: int
    count_target: Callable[[], CountedTarget] = partial(CountedTarget, None, ELSEWHERE)


class TrainingSchedules:
    """Makes the schedule of each segment of a run."""

    def __init__(
        self,
        training: Training,
        loader: PackedLoader,
        target: Target,
        clock: StepClock,
        note: Callable[[str], None],
        is_held_out: bool = False,
    ) -> None:
        """Create it.

        loader: stream of batches, at the position where the run begins. clock: takes the times of all segments.
        note: writes a line to the log. is_held_out: whether the batches are held-out conversations.
        """
        self._training = training
        self._loader = loader
        self._target = target
        self._clock = clock
        self._note = note
        self._is_held_out = is_held_out
        self._chosen: str | None = None
        peak_seconds = None if is_held_out else _peak_seconds(training, target, note)
        self._make = MicroBatchMaker(training.method, target, training.dtype, training.world.device, peak_seconds)

    @contextmanager
    def open(self, segment: Segment, position: DataState | None) -> Iterator[Schedule[Item, Work]]:
        """Context manager that gives the schedule of a segment. position: of the data before it; None = the beginning."""
        if position is not None:
            self._loader.load_state(position)
        if isinstance(self._target, RemoteTarget):
            schedule = self._split(segment, position, self._target)
        else:
            schedule = self._on_same_ranks(segment)
        with schedule:
            yield schedule
        self._chosen = self._chosen or schedule.chosen

    def _on_same_ranks(self, segment: Segment) -> Schedule[Item, Work]:
        training = self._training
        config = training.config

        def prepare(item: Item) -> Work:
            batch, data_state = item
            return self._make(batch), data_state

        producer = Producer(micro_batches(self._loader, segment.num_steps), prepare, _Sizes(training, self._make))
        reads_store = config.target.store is not None
        side = Side(self._chosen or config.placement, config.look_ahead, config.replica_size, reads_store=reads_store)
        if isinstance(self._target, FrozenTarget):
            side = replace(side, groups=self._target.layer_groups(config.overlap.layer_groups))
        elif config.placement == AUTO:
            # A plugin's target may issue collectives or depend on its thread.
            side = replace(side, placement=SERIAL)
        return Schedule.on_same_ranks(producer, side, config.overlap, training.world, self._clock, self._note)

    def _split(self, segment: Segment, position: DataState | None, target: RemoteTarget) -> Schedule[Any, Work]:
        """Return the schedule of a segment whose target runs on other ranks, and let these begin."""
        training = self._training
        config = training.config
        bridge = target.calls.bridge
        wire = _wire_format(config, training.method, training.draft, training.dtype, target.dtype)
        device = training.world.device

        def with_rows() -> Iterator[tuple[Rows, DataState]]:
            for batch, data_state in micro_batches(self._loader, segment.num_steps):
                yield self._make.rows(batch), data_state

        def layout(item: tuple[Rows, DataState]) -> WireStates:
            rows, _ = item
            return wire.layout(rows.batch.num_tokens, len(rows.slots_N))

        def finish(item: tuple[Rows, DataState], states: WireStates) -> Work:
            rows, data_state = item
            return self._make.finish(rows, wire.read(states, to_device(rows.slots_N, device))), data_state

        target.calls.call("open_data", self._loader.stream, position, self._is_held_out)
        target.calls.start("serve", Served(segment.first, segment.num_steps, wire, self._is_held_out))
        look_ahead = bridge.sides.default_look_ahead
        if config.overlap.look_ahead is not None:
            look_ahead = max(config.overlap.look_ahead, bridge.sides.least_look_ahead)
            if look_ahead != config.overlap.look_ahead:
                because = "which the ranks of a copy of the target need to begin together"
                self._note(f"  overlap: a look-ahead of {look_ahead}, {because}")
        limits = limits_of(look_ahead, config.overlap)
        pipeline = SplitPipeline(with_rows(), layout, finish, self._clock, limits, bridge, device)
        return Schedule(pipeline, self._clock, training.world, placement=SPLIT)


def _peak_seconds(training: Training, target: Target, note: Callable[[str], None]) -> PeakSeconds | None:
    """Return what counts the work of a micro-batch; None if the peak rates of the device are unknown.

    note: writes a line to the log.
    """
    device = training.world.device
    try:
        rates = peak_of(device).flops_per_s
    except ValueError:
        return None
    if training.dtype not in rates:
        return None
    rate = rates[training.dtype]
    if not isinstance(target, FrozenTarget):  # it runs on other ranks, or was captured
        return PeakSeconds(training.method, training.draft, rate, note)
    counted = training.count_target()
    if counted.rates is None:
        note(f"  no MFU: the FLOPs of the target are unknown; {counted.problem}")
        return None
    return PeakSeconds(training.method, training.draft, rate, note, counted.rates, rates.get(target.dtype, rate))


def micro_batches(loader: PackedLoader, num_steps: int) -> Iterator[Item]:
    """Yield each micro-batch with the state for resuming after its step."""
    for batches, data_state in itertools.islice(loader, num_steps):
        for batch in batches:
            yield batch, data_state


def check_look_ahead(
    config: Config, ds_config: dict[str, Any], method: DraftMethod, draft: DraftConfig, sides: Sides, device: torch.device
) -> None:
    """Raise ConfigError if the memory of the look-ahead is too small for a copy of the target to begin.

    sides: of the job. device: of this rank.
    """
    limit_mb = config.overlap.look_ahead_mb
    if limit_mb is None or sides.least_look_ahead == 0:
        return
    chosen = "bfloat16" if device.type == "cuda" else "float32"
    last_dtype = getattr(torch, chosen if config.target.dtype == "auto" else config.target.dtype)
    wire = _wire_format(config, method, draft, getattr(torch, compute_dtype(ds_config)), last_dtype)
    num_tokens = config.data.max_tokens * micro_batch_size(ds_config, sides.num_draft)
    needed_mb = -(-sides.least_look_ahead * size_of(wire.layout(num_tokens, num_tokens)) // 2**20)
    if limit_mb < needed_mb:
        problem = (
            f"{sides.replica_size} ranks share a copy of the target and prepare micro-batches together, for which a draft rank "
            f"needs up to {needed_mb} MiB; set it to {needed_mb} or more"
        )
        raise ConfigError(problem, key="overlap.look_ahead_mb", value=limit_mb)


def _wire_format(
    config: Config, method: DraftMethod, draft: DraftConfig, aux_dtype: torch.dtype, last_dtype: torch.dtype
) -> WireFormat:
    """Return the format of states between the sides of a job. aux_dtype, last_dtype: as in `WireFormat`."""
    num_aux = len(draft.aux_layers or ())
    width = draft.target_hidden_size
    return WireFormat(config.overlap.transfer_dtype, width, num_aux, aux_dtype, last_dtype, method.needs_head_stats)


class _Sizes:
    """Returns the bytes of an item's work."""

    def __init__(self, training: Training, make: MicroBatchMaker) -> None:
        self._widths = make.widths(training.draft, training.num_predictions)
        num_tokens = training.config.data.max_tokens * micro_batch_size(training.ds_config, training.world.size)
        self._largest = MicroBatch.num_bytes(num_tokens, num_tokens, self._widths)
        self._is_shared = training.config.replica_size > 1

    def __call__(self, item: Item) -> int:
        if self._is_shared:  # Ranks that share the target must agree on how far it runs ahead.
            return self._largest
        batch, _ = item
        return MicroBatch.num_bytes(batch.num_tokens, int(batch.assistant_mask_T.sum()), self._widths)
