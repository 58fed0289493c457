"""Checkpoints to resume from: DeepSpeed's own, with the step, the data position and every rank's RNG beside the weights."""

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


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in `folder`, each under the tag `step_N`."""

    folder: Path
    keep: int

    def save(self, draft: ZeroDraft, world: World, step: int, data_state: dict[str, Any]) -> None:
        """Save after optimizer step `step`; a collective. Older checkpoints beyond `keep` are deleted afterwards."""
        client_state = {"step": step, "data": data_state, "rng": _all_rng_states(world), "world_size": world.size}
        draft.save(self.folder, f"step_{step}", client_state)
        if world.is_main:
            for old in self._steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step_{old}")
        world.barrier()

    def newest(self) -> str | None:
        """Tag of the newest complete checkpoint: the one that DeepSpeed's `latest` names, written after all else."""
        latest = self.folder / "latest"
        return latest.read_text().strip() if latest.exists() else None

    def resume(self, draft: ZeroDraft, world: World) -> dict[str, Any] | None:
        """Restore the newest checkpoint and this rank's RNG; returns its client state, or None if there is none.

        Raises ValueError if the checkpoint was written by another number of ranks.
        """
        tag = self.newest()
        if tag is None:
            return None
        state = draft.load(self.folder, tag)
        if state["world_size"] != world.size:
            raise ValueError(
                f"{self.folder / tag} was written by {state['world_size']} ranks, this run has {world.size}; "
                f"resume with {state['world_size']}"
            )
        _restore_rng(state["rng"][world.rank])
        return state

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
