"""A training run of two optimizer steps on all ranks, with the embedded target and a few conversations."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.data_section import DataSection
from engine.config.ds_config import accumulation_steps, micro_batch_size
from engine.config.sections import (
    METRICS,
    CheckpointSection,
    Config,
    DraftSection,
    EvaluationSection,
    ParallelSection,
    TargetSection,
)
from engine.host.files import write_text
from engine.host.telemetry import Telemetry
from engine.host.units import counted
from engine.parallel.mesh import World
from engine.setup_checks.finding import Finding, ok, problem
from engine.trainer import Trainer

NUM_STEPS = 2
MAX_TOKENS = 64  # per pack, which is about one of the conversations
VOCAB_SIZE = 64
TRAIN = "train.jsonl"


@dataclass(frozen=True)
class TrialStep:
    """One optimizer step. loss: None = not finite. seconds: its duration."""

    loss: float | None
    seconds: float


def run_trial(
    world: World, ds_config: dict[str, Any], target: Path, folder: Path, timeout_s: int, cache_dir: Path
) -> list[TrialStep]:
    """Train for two steps and export the draft, and return the steps; a collective.

    ds_config: DeepSpeed's configuration, as loaded. target: folder of the embedded target.
    folder: where the run writes. cache_dir: where results of kernels are kept.
    """
    if world.writes_output:
        folder.mkdir(parents=True, exist_ok=True)
        _write_conversations(folder / TRAIN, NUM_STEPS * _packs_per_step(ds_config, world.size))
    world.barrier()
    trainer = Trainer(_config(target, folder, timeout_s, cache_dir), ds_config, world)
    trainer.telemetry = Telemetry(speaks=False)
    trainer.run()
    lines = world.decide(lambda: (folder / METRICS).read_text(encoding="utf-8").splitlines())
    metrics = [json.loads(line) for line in lines]
    return [TrialStep(line["loss"], line["step_s"]) for line in metrics]


def _config(target: Path, folder: Path, timeout_s: int, cache_dir: Path) -> Config:
    data = DataSection(train=(str(folder / TRAIN),), held_out=(), max_tokens=MAX_TOKENS, cache_dir=str(cache_dir), workers=1)
    return Config(
        target=TargetSection(path=str(target)),
        data=data,
        draft=DraftSection(vocab_size=VOCAB_SIZE),
        parallel=ParallelSection(timeout_s=timeout_s),
        checkpoint=CheckpointSection(every_steps=0),
        evaluation=EvaluationSection(num_prompts=0),
        output_dir=str(folder),
        max_steps=NUM_STEPS,
    )


def _packs_per_step(ds_config: dict[str, Any], num_ranks: int) -> int:
    return num_ranks * micro_batch_size(ds_config, num_ranks) * accumulation_steps(ds_config, num_ranks)


def _write_conversations(path: Path, number: int) -> None:
    """Write conversations, each of which fills more than half a pack, and no two of which are the same."""
    lines = []
    for index in range(number):
        answer = f"Number {index} is followed by number {index + 1}, which is followed by number {index + 2}."
        turns = [{"role": "user", "content": f"Count on from {index}."}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": str(index), "conversations": turns}) + "\n")
    write_text(path, "".join(lines))


def judge_trial(steps: Sequence[TrialStep], num_ranks: int) -> Finding:
    """Return the finding on a trial."""
    losses = [step.loss for step in steps]
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if len(finite) < NUM_STEPS:
        text = f"the losses of {NUM_STEPS} steps should be finite, and are {losses}"
        return problem("training", text, "Run `python -m torch.utils.collect_env` and report its output with this line")
    times = f"the first step took {steps[0].seconds:.2g} s, the second {steps[-1].seconds:.2g} s"
    ranks = counted(num_ranks, "rank")
    return ok("training", f"two steps on {ranks}, losses {finite[0]:.3f} and {finite[-1]:.3f}; {times}; exported and reloaded")
