"""Checkpoints to resume from: DeepSpeed's own, with the step, the data position and every rank's RNG beside the weights."""

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from engine.parallel.mesh import World
from engine.parallel.zero import ZeroDraft

TAG = re.compile(r"step_(\d+)")
WORLD = "world.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in `folder`, each under the tag `step_N`."""

    folder: Path
    keep: int

    def save(self, draft: ZeroDraft, world: World, step: int, data_state: dict[str, Any]) -> None:
        """Save after optimizer step `step`; a collective. Earlier checkpoints beyond `keep` are deleted afterwards."""
        tag = f"step_{step}"
        if world.is_main:
            shutil.rmtree(self.folder / tag, ignore_errors=True)  # what a run that was killed here may have left
            (self.folder / tag).mkdir(parents=True)
            (self.folder / tag / WORLD).write_text(json.dumps({"size": world.size}) + "\n", encoding="utf-8")
        world.barrier()
        draft.save(self.folder, tag, {"step": step, "data": data_state, "rng": _all_rng_states(world)})
        if world.is_main:
            self._name_newest(tag)
            for old in [other for other in self._steps() if other <= step][: -self.keep]:
                shutil.rmtree(self.folder / f"step_{old}")
        world.barrier()

    def newest(self) -> str | None:
        """Tag of the newest complete checkpoint: the one that `latest` names, written after all else."""
        latest = self.folder / "latest"
        return latest.read_text(encoding="utf-8").strip() if latest.exists() else None

    def resume(self, draft: ZeroDraft, world: World) -> dict[str, Any] | None:
        """Restore the newest checkpoint and this rank's RNG; returns its client state, or None if there is none.

        Raises ValueError if the checkpoint is not whole or was written by another number of ranks.
        """
        tag = self.newest()
        if tag is None:
            return None
        path = self.folder / tag / WORLD
        if not path.exists():
            raise ValueError(
                f"{self.folder / tag} is no complete checkpoint; delete {self.folder} or set checkpoint.resume=false"
            )
        size = json.loads(path.read_text(encoding="utf-8"))["size"]
        if size != world.size:
            raise ValueError(f"{self.folder / tag} was written by {size} ranks, this run has {world.size}; resume with {size}")
        state = draft.load(self.folder, tag)
        _restore_rng(state["rng"][world.rank])
        return state

    def _name_newest(self, tag: str) -> None:
        """Write `latest`, the file DeepSpeed's tools read too, in one stroke: a kill leaves the old name or the new one."""
        written = self.folder / "latest.new"
        written.write_text(tag, encoding="utf-8")
        written.replace(self.folder / "latest")

    def _steps(self) -> list[int]:
        tags = (TAG.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(tag[1]) for tag in tags if tag)


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
