"""Checkpoints to resume from, written by DeepSpeed.

Next to the weights they hold the step, the data position and the RNG state of every rank.
"""

import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import distributed

from engine.config.sections import OPTIONS
from engine.hidden_states.finite import NonFiniteError
from engine.host.files import write_json, write_text, writing
from engine.parallel.mesh import World
from engine.parallel.zero import ZeroDraft, consolidated_weights, is_sharded, remove_universal, to_universal
from engine.target.identity import what_changed

TAG = re.compile(r"step_(\d+)")
RUN = "run.json"
LATEST = "latest"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in `folder`, each under the tag `step_N`.

    keep: number of checkpoints to keep.
    options: values that a resumed run must have in common with the run that saved, by dotted name.
    target_identity: hashes of the target's config and weights; None if a store records none.
    """

    folder: Path
    keep: int
    options: Mapping[str, Any] = field(default_factory=dict)
    target_identity: str | None = None

    def save(self, draft: ZeroDraft, world: World, step: int, data_state: dict[str, Any]) -> None:
        """Save a checkpoint after optimizer step `step`; a collective.

        Afterwards all but the newest `keep` checkpoints are deleted.
        data_state: plain values, the same on every rank.
        Raises WriteError if it cannot be written; `latest` then names the previous checkpoint.
        Raises NonFiniteError, before anything is written or deleted, if a weight is not finite.
        """
        check_finite_weights(draft, world, step)
        tag = f"step_{step}"
        if world.is_main:
            # A run that was killed while saving may have left a part of this checkpoint.
            shutil.rmtree(self.folder / tag, ignore_errors=True)
            facts = {"ranks": world.size, "step": step, "data": data_state, "options": dict(self.options)}
            facts["target_identity"] = self.target_identity
            with writing(self.folder / tag):
                (self.folder / tag).mkdir(parents=True)
            write_json(self.folder / tag / RUN, facts)
        world.barrier()
        with writing(self.folder / tag):
            draft.save(self.folder, tag, {"rng": _all_rng_states(world)})
        if world.is_main:
            self._name_newest(tag)
            for old in [other for other in self._steps() if other <= step][: -self.keep]:
                shutil.rmtree(self.folder / f"step_{old}")
        world.barrier()

    def newest(self) -> str | None:
        """Return the tag of the newest complete checkpoint, or None if there is none.

        It is the one that `latest` names, because that file is written last.
        Raises ValueError if `latest` cannot be read or does not name a checkpoint.
        """
        latest = self.folder / LATEST
        if not latest.exists():
            return None
        try:
            tag = latest.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{latest} cannot be read ({error}); {self._advice()}") from error
        if TAG.fullmatch(tag) is None:
            problem = f"{latest} is damaged: expected the name of a checkpoint such as step_100, found {tag[:40]!r}"
            raise ValueError(f"{problem}; {self._advice()}")
        return tag

    def _existing(self) -> str:
        """Return the tag of the newest complete checkpoint. Raises ValueError if there is none."""
        tag = self.newest()
        if tag is None:
            raise ValueError(f"{self.folder / LATEST} does not exist, so there is no checkpoint; {self._advice()}")
        return tag

    def _advice(self) -> str:
        """Return advice for the case that the newest checkpoint cannot be read."""
        tags = [f"step_{step}" for step in self._steps()]
        others = f"write one of {', '.join(tags)} into {self.folder / LATEST}, or " if tags else ""
        return f"{others}start a new run in another output_dir"

    def find(self) -> tuple[int, dict[str, Any]] | None:
        """Return the step and data state of the newest checkpoint, or None if there is none.

        No weights are read.
        Raises ValueError if the checkpoint is incomplete, or was written with other options.
        """
        tag = self.newest()
        if tag is None:
            return None
        facts = self._facts(tag)
        saved = facts["options"]
        current = json.loads(json.dumps(dict(self.options)))
        # An option that did not exist when the checkpoint was written behaved as its default.
        saved = {key: OPTIONS[key].default for key in current.keys() & OPTIONS.keys()} | saved
        changes = [f"{key} was {saved.get(key)}, now {value}" for key, value in current.items() if saved.get(key) != value]
        if changes:
            problem = f"{self.folder / tag} was trained with other options: {'; '.join(changes)}"
            raise ValueError(f"{problem}. Restore them, or start a new run in another output_dir")
        return facts["step"], facts["data"]

    def check_target(self) -> str | None:
        """Compare the target of the newest checkpoint with this run's.

        Returns a note if they cannot be compared, otherwise None. Raises ValueError if they differ.
        """
        tag = self._existing()
        saved = self._facts(tag).get("target_identity")
        change = what_changed(saved, self.target_identity)
        if change is not None:
            problem = f"{self.folder / tag} was trained for another target: {change} ({saved}, now {self.target_identity})"
            raise ValueError(f"{problem}. Restore the target, or start a new run in another output_dir")
        if saved is None or self.target_identity is None:
            where = "checkpoint" if saved is None else "store"
            return f"the {where} does not record its target's weights, so it is not known whether they have changed"
        return None

    def check_end(self, step: int, max_steps: int | None) -> None:
        """Raise ValueError if a run of `max_steps` steps ends before the checkpoint of `step`."""
        if max_steps is not None and max_steps < step:
            self.refuse_end(step, f"max_steps={max_steps}", "max_steps")

    def refuse_end(self, step: int, setting: str, option: str) -> NoReturn:
        """Raise ValueError: with `setting`, the run ends before the checkpoint of `step`."""
        raise ValueError(
            f"{self.folder / f'step_{step}'} was saved after step {step}, and {setting} ends the run before it, so there is "
            f"nothing to resume. Raise {option} (a run of exactly {step} steps exports this checkpoint again), or use another "
            "output_dir to train a shorter run"
        )

    def reshape(self, draft: torch.nn.Module, world: World) -> bool:
        """Convert the newest checkpoint if another number of ranks wrote it; a collective.

        Frozen weights are copied from the checkpoint into the draft, because the converted form
        does not contain them. Returns whether a conversion was necessary.
        """
        tag = world.decide(lambda: self._reshaped(world.size))
        if tag is None:
            return False
        frozen = {name: parameter.data for name, parameter in draft.named_parameters() if not parameter.requires_grad}
        if frozen and world.is_main:
            weights = consolidated_weights(self.folder, tag)
            for name, weight in frozen.items():
                weight.copy_(weights[name])
        for weight in frozen.values():
            world.send_from_main(weight)
        return True

    def _reshaped(self, num_ranks: int) -> str | None:
        """Convert the newest checkpoint for `num_ranks` ranks and return its tag.

        Returns None if no conversion is necessary.
        """
        tag = self._existing()
        if self._facts(tag)["ranks"] == num_ranks or not is_sharded(self.folder, tag):
            return None
        to_universal(self.folder, tag)
        return tag

    def load(self, draft: ZeroDraft, world: World) -> None:
        """Restore the newest checkpoint; a collective.

        This rank's RNG state is restored too if the same number of ranks wrote the checkpoint.
        Raises ValueError if a part of the checkpoint is missing.
        """
        tag = world.decide(self._existing)
        state = draft.load(self.folder, tag)
        if len(state["rng"]) == world.size:
            _restore_rng(state["rng"][world.rank])
        world.barrier()
        if world.is_main:
            remove_universal(self.folder, tag)

    def _facts(self, tag: str) -> dict[str, Any]:
        """Return the facts that `save` wrote next to a checkpoint's weights.

        Raises ValueError if the file is missing or damaged.
        """
        path = self.folder / tag / RUN
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            problem = f"{self.folder / tag} is not a complete checkpoint: it has no {RUN}"
            raise ValueError(f"{problem}; {self._advice()}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); {self._advice()}") from error
        kinds = {"ranks": int, "step": int, "data": dict, "options": dict}
        for key, kind in kinds.items():
            value = facts.get(key) if isinstance(facts, dict) else None
            if type(value) is not kind:
                problem = f"{path} is damaged: expected {kind.__name__} under {key!r}, found {value!r:.40}"
                raise ValueError(f"{problem}; {self._advice()}")
        if f"step_{facts['step']}" != tag:
            raise ValueError(f"{path} is damaged: it is of step {facts['step']}; {self._advice()}")
        return facts

    def _name_newest(self, tag: str) -> None:
        """Write `latest` atomically: a killed run leaves either the old name or the new one.

        DeepSpeed's tools read the file too.
        """
        write_text(self.folder / LATEST, tag)

    def _steps(self) -> list[int]:
        tags = (TAG.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(tag[1]) for tag in tags if tag)


def check_finite_weights(draft: ZeroDraft, world: World, step: int) -> None:
    """Raise NonFiniteError on every rank if a weight is not finite after `step`; a collective."""
    if not draft.has_finite_weights(world):
        raise NonFiniteError(
            f"weights of the draft are not finite after step {step}. No checkpoint or draft was written, and earlier ones are "
            "kept. Resume from the newest checkpoint (checkpoint.resume=true) with a lower learning rate "
            "(optimizer.params.lr) or gradient_clipping"
        )


def _all_rng_states(world: World) -> list[dict[str, Any]]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    states: list[Any] = [None] * world.size
    if world.size == 1:
        return [state]
    distributed.all_gather_object(states, state)
    return states


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
