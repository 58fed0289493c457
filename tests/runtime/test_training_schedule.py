"""Every placement, look-ahead and accumulation gives the losses of serial execution, on four real ranks."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from engine.config.ds_config import load_ds_config, resolve_ds_config
from engine.config.sections import Config, DataSection, DraftSection, OverlapSection, ParallelSection, TttSection
from engine.data.documents import Document, DocumentList
from engine.data.packed_loader import PackedLoader
from engine.kernels import PLAIN
from engine.models.draft_method import DraftMethod
from engine.models.method_registry import make_method
from engine.models.normaliser import Normaliser
from engine.models.vocab_map import VocabMap
from engine.overlap import placement
from engine.overlap.step_clock import StepClock
from engine.parallel.mesh import TargetMesh, World
from engine.parallel.zero import ZeroDraft
from engine.runtime.training_loop import Segment
from engine.runtime.training_schedule import Training, TrainingSchedules
from engine.target.frozen import FrozenTarget
from tests.distributed import run_ranks
from tests.parallel.families import tiny_model

RANKS = 4
ZERO2 = Path(__file__).resolve().parents[2] / "ds_configs" / "zero2.json"
# Not a multiple of the micro-batches of a step: the last one is filled with silent ones. `auto` takes steps to choose.
NUM_DOCUMENTS = {1: 55, 2: 37, 3: 37, 4: 55}
MAX_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """A run. family: of the target. placement, look_ahead: of the run."""

    accumulation: int
    tp_size: int = 1
    ep_size: int = 1
    placement: str = "serial"
    look_ahead: int | None = None
    layer_groups: int = 3

    @property
    def serial(self) -> "Case":
        return Case(self.accumulation, self.tp_size, self.ep_size)

    @property
    def config(self) -> Config:
        return Config(
            data=DataSection(max_tokens=MAX_TOKENS, balance_steps=1),
            draft=DraftSection(vocab_size=40),
            ttt=TttSection(steps=3),
            parallel=ParallelSection(tp_size=self.tp_size, ep_size=self.ep_size),
            overlap=OverlapSection(
                placement=self.placement,
                look_ahead=self.look_ahead,
                layer_groups=self.layer_groups,
                check_order=self.placement != "serial",
            ),
        )


CASES = (
    Case(4, placement="colocated", look_ahead=4),
    Case(1, placement="auto", look_ahead=2),
    Case(1, tp_size=2, placement="auto", look_ahead=1),
    Case(3, tp_size=4, placement="colocated", look_ahead=0, layer_groups=1),
    Case(2, tp_size=2, ep_size=4, placement="colocated", look_ahead=3, layer_groups=99),
)


def documents(count: int) -> DocumentList:
    generator = np.random.default_rng(0)
    made = []
    for number in range(count):
        length = 5 + number % 17
        ids = generator.integers(4, 60, length)
        made.append(Document(ids.astype(np.int32), np.arange(length) >= 2, (length,)))
    return DocumentList(made)


def losses_of_runs(world: World) -> dict[Case, list[float]]:
    """The losses of every step of every case, and of its serial counterpart."""
    for name, steps in {"WARM_UP_STEPS": 1, "MEASURED_STEPS": 2, "PHASE_STEPS": 3}.items():
        setattr(placement, name, steps)  # so that `auto` switches, and switches back, within the run
    losses: dict[Case, list[float]] = {}
    for case in CASES:
        for run in (case.serial, case):
            if run not in losses:
                losses[run] = losses_of(world, run)
    return losses


def losses_of(world: World, case: Case) -> list[float]:
    config = case.config
    mesh = TargetMesh.of(config.parallel, world)
    target = FrozenTarget(tiny_model("qwen3_moe"), (0, 1, 2), mesh=mesh)
    method: DraftMethod = make_method(config)
    draft_config = replace(method.derive_config(target.config, target.aux_layers), dtype="float32")
    vocab_map = VocabMap.most_frequent(torch.arange(target.config.vocab_size), 40)
    torch.manual_seed(0)
    draft = method.new_draft(draft_config, PLAIN, target, vocab_map)
    raw = load_ds_config(ZERO2)
    raw["gradient_accumulation_steps"] = case.accumulation
    raw["bf16"]["enabled"] = False
    loader = PackedLoader(
        documents(NUM_DOCUMENTS[case.accumulation]),
        max_tokens=MAX_TOKENS,
        packs_per_batch=1,
        rank=world.rank,
        world_size=world.size,
        accumulation_steps=case.accumulation,
        seed=0,
        epochs=1,
        balance_steps=1,
    )
    num_steps = loader.num_steps
    resolved = resolve_ds_config(raw, world_size=world.size, total_steps=num_steps, hidden_size=draft_config.hidden_size)
    zero = ZeroDraft(draft, method.make_objective(target, vocab_map), resolved)
    normalise = Normaliser(zero.objective, zero.forward, world)
    training = Training(
        config=config,
        ds_config=raw,
        world=world,
        method=method,
        draft=draft_config,
        dtype=zero.dtype,
        num_predictions=zero.objective.num_steps,
    )
    losses = []
    schedules = TrainingSchedules(training, loader, target, StepClock(world.device), lambda line: None)
    position = None
    first = num_steps * 2 // 3
    for segment in (Segment(1, first), Segment(first + 1, num_steps)):
        with schedules.open(segment, position) as schedule:
            for step in range(segment.first, segment.last + 1):
                taken = schedule.take(step, case.accumulation)
                micros = [micro for micro, _ in taken]
                loss = torch.zeros(())
                for micro, norms in zip(micros, normalise(micros), strict=True):
                    loss += zero.train(micro, norms, schedule.part).loss.detach()
                schedule.end_step()
                losses.append(world.sum(loss).item())
                position = taken[-1][1]
    return losses


def test_every_placement_gives_the_losses_of_serial_execution():
    for losses in run_ranks(losses_of_runs, RANKS):
        for case in CASES:
            assert losses[case] == losses[case.serial] and len(set(losses[case])) == len(losses[case]) > 1, case
