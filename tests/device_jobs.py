"""The jobs of a run on `FakeDevice`: a target's forward, a whole training, a capture.

DeepSpeed has no part in them, since its engine would look for a real device. `PlainDraft` stands
in for it, with AdamW.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from engine import trainer
from engine.batch import DraftOutput, LossNorms, MicroBatch, PackedBatch
from engine.config.ds_config import load_ds_config
from engine.config.recipe import load_config
from engine.hidden_states.capture import Capture, CaptureReport
from engine.host.telemetry import Telemetry
from engine.kernels import Kernels
from engine.kernels.self_check import SelfCheck
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.unroll import TrainingTimeTest
from engine.parallel.mesh import World
from engine.parallel.zero import Part, ZeroDraft, no_part
from engine.target.frozen import FrozenTarget
from tests.device_tensors import DEVICE
from tests.fake_device import FakeDevice, Wait

DS_CONFIG = Path(__file__).resolve().parents[1] / "ds_configs" / "zero3.json"


@dataclass
class Step:
    """What one training step did: waits of the host, and launches."""

    waits: list[Wait]
    launches: int


@dataclass
class PlainDraft(ZeroDraft):
    """A `ZeroDraft` without DeepSpeed.

    steps: what happened in each step but the first.
    """

    draft: Eagle3Draft
    objective: TrainingTimeTest
    ds_config: dict[str, Any]
    universal: bool = False
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draft.to(self.dtype)
        self.engine = SimpleNamespace(module=self.draft)
        trained = [parameter for parameter in self.draft.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-3)
        self.learning_rate = 1e-3
        self._before: tuple[int, int] | None = None

    optimizer_name = "torch.optim.AdamW"
    accumulation_steps = 1
    num_skipped_steps = 0
    grad_norm = None
    dtype = torch.bfloat16

    def forward(self, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        return self.objective(self.draft, micro, norms)

    @torch.no_grad()
    def logits(self, micro: MicroBatch) -> torch.Tensor:
        return torch.stack(self.objective.logits(self.draft, micro))

    def train(self, micro: MicroBatch, norms: LossNorms, part: Part = no_part) -> DraftOutput:
        with part("draft_forward"):
            output = self.forward(micro, norms)
        with part("backward"):
            output.loss.backward()
        self._note_step()
        with part("optimizer"):
            self._optimizer.step()
            self._optimizer.zero_grad()
        return output

    def _note_step(self) -> None:
        """Note a step, which goes from one backward pass to the next and so holds its logging too."""
        fake = FakeDevice.active
        now = len(fake.waits), fake.launches.total()
        if self._before is not None:
            self.steps.append(Step(fake.waits[self._before[0] :], now[1] - self._before[1]))
        self._before = now

    def write_monitors(self, values: dict[str, float], step: int) -> None:
        pass

    def gathered_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.draft.named_parameters():
            yield name, parameter.detach().cpu()


@contextmanager
def without_deepspeed() -> Iterator[list[PlainDraft]]:
    """Within it, trainers train a `PlainDraft`; yields those that were made."""
    made: list[PlainDraft] = []

    def make(*arguments: Any, **options: Any) -> PlainDraft:
        made.append(PlainDraft(*arguments, **options))
        return made[-1]

    with mock.patch.object(trainer, "ZeroDraft", make):
        yield made


@contextmanager
def kernels_are_trusted() -> Iterator[None]:
    """Within it, no kernel is checked or timed, which would take Triton's interpreter long."""

    def unchanged(check: SelfCheck, kernels: Kernels, *arguments: Any, **options: Any) -> Kernels:
        return kernels

    def none_failed(check: SelfCheck, *arguments: Any, **options: Any) -> set[str]:
        return set()

    trusting = {"sound": unchanged, "failed": none_failed}
    with mock.patch.multiple(SelfCheck, **trusting):
        yield


@contextmanager
def stages_are_noted() -> Iterator[None]:
    """Within it, waits say in which stage of a job they happened."""
    stage = Telemetry.stage

    @contextmanager
    def noted(telemetry: Telemetry, name: str) -> Iterator[None]:
        FakeDevice.active.stage = name
        with stage(telemetry, name):
            yield
        FakeDevice.active.stage = "between stages"

    with mock.patch.object(Telemetry, "stage", noted):
        yield


def training_options(output: Path, target: Path, train: str, held_out: str) -> list[str]:
    """A recipe of two steps and two held-out prompts."""
    return [
        f"output_dir={output}",
        f"target.path={target}",
        "target.aux_layers=[0,1,3]",
        f"data.train={train}",
        f"data.held_out={held_out}",
        "data.max_tokens=40",
        "draft.vocab_size=48",
        "ttt.steps=2",
        "evaluation.num_prompts=2",
        "checkpoint.every_steps=0",
        "evaluation.max_new_tokens=3",
        "max_steps=2",
    ]


def run_training(options: list[str]) -> PlainDraft:
    """Run the whole training job; returns the draft with what happened in its steps."""
    config = load_config(None, options)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    with without_deepspeed() as made, stages_are_noted(), kernels_are_trusted():
        trainer.Trainer(config, load_ds_config(DS_CONFIG), World.alone()).run()
    return made[0]


def run_capture(store: Path, target: Path, train: str) -> CaptureReport:
    """Capture a store of bf16 states on the device that is there."""
    options = [
        f"target.store={store}",
        f"target.path={target}",
        "target.aux_layers=[0,1,3]",
        f"data.train={train}",
        "data.max_tokens=200",
        "draft.vocab_size=48",
    ]
    with stages_are_noted(), kernels_are_trusted():
        return Capture(load_config(None, options), World.alone()).run()


def forward_of(model: PreTrainedModel, aux_layers: tuple[int, ...], lengths: tuple[int, ...] = (9, 14, 5)) -> Step:
    """Run packed documents through a target twice; returns what happened the second time."""
    fake = FakeDevice.active
    target = FrozenTarget(model.to(DEVICE), aux_layers)
    for _ in range(2):
        batch = random_batch(lengths, target.config.vocab_size)
        with fake.counting() as found:
            target(batch, torch.arange(1, batch.num_tokens, 2))
    return Step(found.waits, found.launches)


def random_batch(lengths: tuple[int, ...], vocab_size: int) -> PackedBatch:
    """Documents of these lengths on the host, in which no token occurs twice."""
    documents = [torch.randperm(vocab_size)[:length] for length in lengths]
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    return PackedBatch(torch.cat(documents), torch.ones(sum(lengths), dtype=torch.bool), cu_seqlens)
