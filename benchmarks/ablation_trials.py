"""One trial of an ablation: a draft that is trained by the product's commands and measured by its evaluator."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config.recipe import load_config
from engine.config.sections import EvaluationSection
from engine.data.cpython_corpus import write_corpus
from engine.data.templates import load_tokenizer
from engine.evaluation.acceptance import Prompt, held_out_prompts
from engine.evaluation.decoding import Generation
from engine.evaluation.evaluator import AcceptanceEvaluator
from engine.host.files import write_json
from engine.host.telemetry import Telemetry
from engine.models.eagle3.export import load_draft
from engine.parallel.mesh import World
from engine.target.frozen import FrozenTarget
from launcher.command import DEFAULT_RECIPE, EMBEDDED_TARGET

ROOT = Path(__file__).resolve().parents[1]
DS_CONFIGS = ROOT / "ds_configs"
PROMPTS_PER_BATCH = 32
NUM_STEPS = 5  # drafted tokens, also where the recipe has fewer
CHECKPOINT_STEPS = 100
LOG_TAIL_CHARACTERS = 1500


@dataclass(frozen=True)
class Variant:
    """The default job with one thing changed.

    about: the change, for the table. options: overrides of the recipe.
    ds_config: DeepSpeed's configuration, in `ds_configs/`. learning_rate: takes the place of its `optimizer.params.lr`.
    store: precision of the captured hidden states that it is trained from; None = the target runs.
    """

    about: str
    options: tuple[str, ...] = ()
    ds_config: str = "zero2.json"
    learning_rate: float | None = None
    store: str | None = "float32"

    def deepspeed(self) -> dict[str, Any]:
        """Return DeepSpeed's configuration."""
        values = json.loads((DS_CONFIGS / self.ds_config).read_text(encoding="utf-8"))
        if self.learning_rate is not None:
            values["optimizer"]["params"]["lr"] = self.learning_rate
        return values


@dataclass(frozen=True)
class Budget:
    """What every training and measurement has in common.

    num_prompts: held-out prompts decoded, at most. max_new_tokens: tokens decoded per prompt.
    """

    max_steps: int
    num_prompts: int
    max_new_tokens: int


@dataclass(frozen=True)
class Trial:
    """One training of a variant with a seed, and its measurement. name: the variant's."""

    name: str
    variant: Variant
    seed: int
    budget: Budget

    @functools.cached_property
    def key(self) -> str:
        """A hash of all options and sizes, 12 hexadecimal digits."""
        chosen = asdict(self) | {
            "recipe": DEFAULT_RECIPE.read_text(encoding="utf-8"),
            "deepspeed": self.variant.deepspeed(),
        }
        del chosen["name"]
        del chosen["variant"]["about"]
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder_name(self) -> str:
        return f"{self.name.replace(' ', '_')}-{self.seed}-{self.key}"


class FailedCommandError(RuntimeError):
    """A command of the product ended with an error; str() holds the end of its output."""


class CommandTrainer:
    """Trains with `launcher/train.py`, and captures stores with `launcher/capture_hidden_states.py`."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._capturing = threading.Lock()

    def __call__(self, trial: Trial) -> Path:
        """Train, or continue a training that was interrupted, and return the folder of the draft.

        Raises FailedCommandError.
        """
        folder = self._output_dir / "runs" / trial.folder_name
        options = [
            *trial.variant.options,
            f"seed={trial.seed}",
            f"max_steps={trial.budget.max_steps}",
            f"output_dir={folder}",
            "evaluation.num_prompts=0",
            f"checkpoint.every_steps={CHECKPOINT_STEPS}",
            "checkpoint.resume=auto",
        ]
        if trial.variant.store is not None:
            with self._capturing:
                options.append(f"target.store={self._store(trial.variant.store)}")
        ds_config = folder.with_suffix(".json")
        ds_config.parent.mkdir(parents=True, exist_ok=True)
        write_json(ds_config, trial.variant.deepspeed())
        self._run("train.py", [f"--ds_config={ds_config}", *options], folder.with_suffix(".log"))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return folder / "draft"

    def _store(self, dtype: str) -> Path:
        """Return a complete store; an interrupted capture continues."""
        folder = self._output_dir / "stores" / dtype
        done = folder.with_suffix(".complete")
        if not done.exists():
            arguments = [f"target.store={folder}", f"store.dtype={dtype}"]
            self._run("capture_hidden_states.py", arguments, folder.with_suffix(".log"))
            done.touch()
        return folder

    def _run(self, command: str, arguments: Sequence[str], log: Path) -> None:
        """Run a command of the launcher on one thread. Raises FailedCommandError."""
        log.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, str(ROOT / "launcher" / command), *arguments, "parallel.cpu_threads=1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            tail = log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:]
            raise FailedCommandError(f"{command} ended with code {done.returncode}; the end of {log}:\n{tail}")


class AcceptanceMeasurer:
    """Decodes the held-out prompts greedily with drafts.

    The target decodes its replies once per process, and each draft is replayed on them, which gives the
    same acceptance as decoding (`engine/evaluation/replay.py`).
    section: the sizes of the measurement.
    """

    def __init__(self, output_dir: Path, budget: Budget) -> None:
        config = load_config(DEFAULT_RECIPE, [f"target.path={EMBEDDED_TARGET}"])
        _, held_out = write_corpus(output_dir / "corpus")
        tokenizer = load_tokenizer(config.target, config.data)
        prompts = held_out_prompts([held_out], tokenizer, budget.num_prompts, config.data.template_kwargs)
        self.section = EvaluationSection(
            num_prompts=len(prompts),
            max_new_tokens=budget.max_new_tokens,
            num_steps=NUM_STEPS,
            prompts_per_batch=PROMPTS_PER_BATCH,
        )
        self._target_section = config.target
        self._embed_weight_VD = self._load_target().embedding.whole()
        self._make = functools.partial(
            AcceptanceEvaluator,
            self.section,
            tokenizer=tokenizer,
            prompts=prompts,
            world=World.alone(),
            telemetry=Telemetry(speaks=False),
            max_tokens=config.data.max_tokens,
        )
        self._evaluators: dict[tuple[int, ...], AcceptanceEvaluator] = {}
        self._measuring = threading.Lock()

    def __call__(self, draft: Path) -> tuple[list[int], list[int]]:
        """Return the tokens and the target forwards of each prompt."""
        tokens: list[int] = []
        forwards: list[int] = []

        def add(prompt: Prompt, generation: Generation) -> None:
            tokens.append(len(generation.token_ids) - 1)
            forwards.append(generation.num_target_forwards)

        with self._measuring:
            served = load_draft(draft, self._embed_weight_VD, torch.float32)
            self._evaluator(served.model.config.aux_layers).measure_draft(served, add)
        return tokens, forwards

    def _evaluator(self, aux_layers: tuple[int, ...]) -> AcceptanceEvaluator:
        if aux_layers not in self._evaluators:
            self._evaluators[aux_layers] = self._make(target=self._load_target(aux_layers))
        return self._evaluators[aux_layers]

    def _load_target(self, aux_layers: tuple[int, ...] | None = None) -> FrozenTarget:
        return FrozenTarget.load(self._target_section, torch.device("cpu"), aux_layers)
