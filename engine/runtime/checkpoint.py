"""Checkpoints to resume from, written by DeepSpeed.

Next to the weights they hold the step, the data position, and the RNG state and the unlogged
metrics of every rank. A checkpoint counts only if it has a `complete.json` with a checksum of every
file. Earlier versions wrote none; such a checkpoint counts if `latest` names it.
"""

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from engine.config.block_sections import NO_PARITY
from engine.config.ds_config import MUON
from engine.config.sections import DRAFT, FORMER_DEFAULTS, OPTIONS, is_default
from engine.hidden_states.finite import NonFiniteError
from engine.host.checkpoint_files import COMPLETE, SECONDS_BETWEEN_LOOKS, num_bytes_of, problem_of
from engine.host.files import write_json, write_text, writing
from engine.parallel.mesh import World
from engine.parallel.zero import ZeroDraft
from engine.parallel.zero_checkpoint import CheckpointForm, consolidated_weights, is_sharded, remove_universal, to_universal
from engine.target.identity import what_changed

TAG = re.compile(r"step_(\d+)")
RUN = "run.json"
LATEST = "latest"
STAGE = "zero_optimization.stage"
SHARDED_STAGES = {1, 2, 3}  # whose checkpoints can be converted to one another
ALIKE_STAGES = {1, 2}  # which DeepSpeed itself reads from one universal form
OF_DEEPSPEED = ("optimizer.", "zero_optimization.")  # beginnings of keys of DeepSpeed's file among the options
SECONDS_AFTER_ERROR = 8.0  # for which an error waits for the checkpoint that is being written; well below parallel.hang_s
SPARE_BYTES = 4 << 20  # that must stay free on the disk in addition to a checkpoint
DataState = dict[str, Any]  # position in the data, from which a run resumes


@dataclass(frozen=True)
class DraftExport:
    """The export of a draft next to a checkpoint.

    write: writes a draft folder from names and weights. further_bytes: that it writes besides the weights.
    """

    write: Callable[[Path, list[tuple[str, torch.Tensor]]], None]
    further_bytes: int


class BrokenCheckpointError(ValueError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint, in `folder / tag`.

    num_ranks: that wrote it. step: optimizer steps before it. data_state: position of the data.
    options: values that a resumed run must have in common with the run that saved, by dotted name.
    target_identity: hashes of the target's config and weights; None = unknown.
    schedule: what the learning rate of every step follows from; None = unknown.
    is_checked: whether its files were compared with their checksums.
    """

    folder: Path
    tag: str
    num_ranks: int
    step: int
    data_state: DataState
    options: Mapping[str, Any]
    target_identity: str | None
    is_checked: bool
    schedule: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path, tag: str) -> "Checkpoint":
        """Read the facts about a checkpoint and compare its files with their checksums.

        Raises BrokenCheckpointError.
        """
        place = folder / tag
        facts = _read_facts(place / RUN)
        is_checked = (place / COMPLETE).exists()
        is_old = not facts.get("checksums") and _latest_tag(folder) == tag
        if is_checked or not is_old:
            problem = problem_of(place)
            if problem is not None:
                raise BrokenCheckpointError(f"{place}: {problem}")
        if f"step_{facts['step']}" != tag:
            raise BrokenCheckpointError(f"{place / RUN} is damaged: it is of step {facts['step']}")
        options = facts["options"]
        identity = facts.get("target_identity")
        schedule = facts.get("schedule")
        return cls(folder, tag, facts["ranks"], facts["step"], facts["data"], options, identity, is_checked, schedule)

    @property
    def place(self) -> Path:
        return self.folder / self.tag

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError if the checkpoint was written with other options than a run's."""
        current = json.loads(json.dumps(dict(options)))
        # An option that did not exist when the checkpoint was written behaved as its default. A key of
        # DeepSpeed's file that an earlier version did not record is unknown.
        saved = {key: OPTIONS[key].default for key in current.keys() & OPTIONS.keys()} | dict(self.options)
        gone = [key for key in self.options if key not in current and key not in OPTIONS]
        unknown = [key for key in gone if not key.startswith(OF_DEEPSPEED)]
        if unknown:
            problem = f"{self.place} was written by a newer version, which has the options {', '.join(unknown)}"
            raise ValueError(f"{problem}. Resume it with that version")
        changes = [f"{key} was {self.options[key]}, now unset" for key in gone]
        for key, value in current.items():
            is_converted = key == STAGE and {saved.get(key), value} <= SHARDED_STAGES and saved.get("optimizer.type") != MUON
            is_same = is_converted or _mean_the_same(key, saved.get(key), value, current)
            if key in saved and saved[key] != value and not is_same:
                changes.append(f"{key} was {saved[key]}, now {value}")
        if changes:
            problem = f"{self.place} was trained with other options: {'; '.join(changes)}"
            raise ValueError(f"{problem}. Restore them, or start a new run in another output_dir")

    def changed_schedule(self, schedule: Mapping[str, Any]) -> str | None:
        """Return a note that the learning rate of later steps follows from other values than before, or None."""
        saved = self.schedule or {}
        changes = [f"{key} was {saved[key]}, now {value}" for key, value in schedule.items() if saved.get(key, value) != value]
        return f"the learning rate continues on another curve: {'; '.join(changes)}" if changes else None

    def check_target(self, identity: str | None) -> str | None:
        """Compare the target of the checkpoint with a run's.

        Returns a note if they cannot be compared, otherwise None. Raises ValueError if they differ.
        """
        saved = self.target_identity
        change = what_changed(saved, identity)
        if change is not None:
            problem = f"{self.place} was trained for another target: {change} ({saved}, now {identity})"
            raise ValueError(f"{problem}. Restore the target, or start a new run in another output_dir")
        if saved is None or identity is None:
            where = "checkpoint" if saved is None else "store"
            return f"the {where} does not record its target's weights, so it is not known whether they have changed"
        return None

    def check_end(self, max_steps: int | None) -> None:
        """Raise ValueError if a run of `max_steps` steps ends before the checkpoint."""
        if max_steps is not None and max_steps < self.step:
            self.refuse_end(f"max_steps={max_steps}", "max_steps")

    def refuse_end(self, setting: str, option: str) -> NoReturn:
        """Raise ValueError: with `setting`, the run ends before the checkpoint."""
        raise ValueError(
            f"{self.place} was saved after step {self.step}, and {setting} ends the run before it, so there is "
            f"nothing to resume. Raise {option} (a run of exactly {self.step} steps exports this checkpoint again), or use "
            "another output_dir to train a shorter run"
        )

    def reshape(self, draft: torch.nn.Module, world: World, stage: int | None = None) -> CheckpointForm:
        """Convert the checkpoint if another number of ranks or another ZeRO stage wrote it; a collective.

        stage: of the run; None = that of the checkpoint.
        Weights that the converted form does not restore are copied from the checkpoint into the draft.
        Returns the form from which `load` is to read it. Raises ValueError if it cannot be converted.
        """
        form = world.decide(lambda: self._convert(world.size, stage))
        if form == CheckpointForm.OWN:
            return form
        copied = {}
        for name, parameter in draft.named_parameters():
            if form == CheckpointForm.STATES or not parameter.requires_grad:
                copied[name] = parameter.data
        if copied and world.is_main:
            weights = consolidated_weights(self.folder, self.tag)
            for name, weight in copied.items():
                weight.copy_(weights[name])
        for weight in copied.values():
            world.send_from_main(weight)
        return form

    def _convert(self, num_ranks: int, stage: int | None) -> CheckpointForm:
        """Convert the checkpoint for another number of ranks or stage, if this is necessary."""
        saved_stage = self.options.get(STAGE, stage)
        is_same_stage = stage is None or saved_stage == stage
        if (self.num_ranks == num_ranks and is_same_stage) or not is_sharded(self.folder, self.tag):
            return CheckpointForm.OWN
        if self.options.get("optimizer.type") == MUON:
            problem = "holds Muon's momentum, which DeepSpeed cannot convert"
            same = f"{self.num_ranks} ranks and ZeRO stage {self.options.get(STAGE)}"
            raise ValueError(f"{self.place} {problem}. Resume it on {same}, as it was written")
        if not self.is_checked:
            problem = f"{self.place} has no checksums, so it is not converted for {num_ranks} ranks and ZeRO stage {stage}"
            as_written = f"{self.num_ranks} ranks and stage {saved_stage}"
            raise ValueError(f"{problem}. Resume it once on {as_written}, which writes a checkpoint that has some")
        to_universal(self.folder, self.tag)
        is_alike = is_same_stage or {saved_stage, stage} <= ALIKE_STAGES
        return CheckpointForm.UNIVERSAL if is_alike else CheckpointForm.STATES

    def load(self, draft: ZeroDraft, world: World) -> list[Any]:
        """Restore the checkpoint and return the metrics state of every rank that wrote it; a collective.

        This rank's RNG state is restored too if the same number of ranks wrote the checkpoint.
        Raises ValueError if a file is missing or holds anything else than data.
        """
        state = draft.load(self.folder, self.tag)
        if len(state["rng"]) == world.size:
            _restore_rng(state["rng"][world.rank])
        world.barrier()
        if world.is_main:
            remove_universal(self.folder, self.tag)
        return state.get("metrics", [])


def _mean_the_same(key: str, saved: Any, value: Any, options: Mapping[str, Any]) -> bool:
    """Return whether two values of an option mean the same in a run with these options: an earlier spelling and today's."""
    if key == "block.anchors":
        return {saved, value} <= {None, "all"}
    is_spelt_anew = key in FORMER_DEFAULTS and is_default(key, saved) and is_default(key, value)
    return is_spelt_anew and options.get("objective.parity", NO_PARITY) == NO_PARITY


def _latest_tag(folder: Path) -> str | None:
    """Return the tag that `latest` names, or None if there is no such file or it is damaged."""
    try:
        tag = (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return tag if TAG.fullmatch(tag) else None


def _read_facts(path: Path) -> dict[str, Any]:
    """Return the facts next to a checkpoint's weights. Raises BrokenCheckpointError."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BrokenCheckpointError(f"{path.parent} is not complete: it has no {RUN}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenCheckpointError(f"{path} is damaged ({error})") from error
    kinds = {"ranks": int, "step": int, "data": dict, "options": dict}
    for key, kind in kinds.items():
        value = facts.get(key) if isinstance(facts, dict) else None
        if type(value) is not kind:
            raise BrokenCheckpointError(f"{path} is damaged: expected {kind.__name__} under {key!r}, found {value!r:.40}")
    return facts


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in `folder`, each under the tag `step_N`.

    keep: number of newest checkpoints to keep. options, target_identity, schedule: of the run, as in `Checkpoint`.
    best_step: returns the step of the best draft, whose checkpoint is kept too; None = unknown.
    """

    folder: Path
    keep: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    target_identity: str | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)
    best_step: Callable[[], int | None] = lambda: None

    def find(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None if no checkpoint was ever complete.

        All its files are read, to compare their checksums. Broken ones are passed over with a warning.
        Raises ValueError if there are checkpoints and all are broken.
        """
        problems = []
        for tag in reversed(self.tags()):
            try:
                return Checkpoint.read(self.folder, tag)
            except BrokenCheckpointError as error:
                problems.append(str(error))
                warn(f"not resumed from: {error}")
        if problems and (self.folder / LATEST).exists():
            advice = "Start a new run in another output_dir, or restore one of them"
            raise ValueError(f"{self.folder} holds no checkpoint that is whole ({problems[0]}). {advice}")
        return None

    def tags(self) -> list[str]:
        """Return the tags of all checkpoints, complete or not, the oldest first."""
        return [f"step_{step}" for step in self._steps()]

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        tags = (TAG.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(tag[1]) for tag in tags if tag)

    def publish(self, step: int) -> None:
        """Name a complete checkpoint in `latest`, which DeepSpeed's tools read, and delete old ones."""
        write_text(self.folder / LATEST, f"step_{step}")
        best_step = self.best_step()
        for old in [other for other in self._steps() if other <= step][: -self.keep]:
            if old != best_step:
                shutil.rmtree(self.folder / f"step_{old}", ignore_errors=True)


class CheckpointWriter:
    """Writes the checkpoints of a run while it goes on.

    A checkpoint that cannot be written is a warning: the run goes on, and the previous one is kept.

    num_saved: checkpoints begun. longest_stall_s: longest time for which one has held up training.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        draft: ZeroDraft,
        world: World,
        warn: Callable[[str], None],
        timeout_s: float = 900.0,
        export: DraftExport | None = None,
    ) -> None:
        """Create a writer.

        timeout_s: how long rank 0 waits for the files of other ranks; less than their collectives wait for rank 0.
        export: writes the draft in the format of servers next to each checkpoint; None = not written.
        """
        self._checkpoints = checkpoints
        self._draft = draft
        self._world = world
        self._warn = warn
        self._timeout_s = timeout_s
        self._export = export
        self.num_saved = 0
        self.longest_stall_s = 0.0
        self._is_complete = True  # the last checkpoint, or there was none
        self._last: Path | None = None

    def save(self, step: int, data_state: DataState, metrics: Any = None) -> None:
        """Begin to write a checkpoint after optimizer step `step`; a collective.

        data_state: plain values, the same on every rank. metrics: state of this rank's metrics.
        Raises NonFiniteError, before anything is written or deleted, if a weight is not finite.
        """
        began_s = time.perf_counter()
        self.finish()
        check_finite_weights(self._draft, self._world, step)
        tag = f"step_{step}"
        folder = self._checkpoints.folder
        states = self._world.gather((_rng_state(self._world), metrics))
        client_state = {"rng": [rng for rng, _ in states], "metrics": [own for _, own in states]}
        self._draft.save(folder, tag, client_state)
        weights = [] if self._export is None else list(self._draft.gathered_weights())
        own_bytes = self._draft.files.num_bytes + num_bytes_of([weight for _, weight in weights])
        if self._export is not None and self._world.is_main:
            own_bytes += self._export.further_bytes
        num_bytes = int(self._world.sum(torch.tensor([own_bytes], device=self._world.device)).item())
        problem = self._world.decide(lambda: self._prepare(step, data_state, num_bytes))
        if problem is not None:
            self._draft.files.discard()
            self._is_complete = False
            self._warn_of(step, problem)
            return
        add = None if self._export is None else partial(self._export.write, folder / tag / DRAFT, weights)
        self._draft.files.write(folder / tag, lambda: self._checkpoints.publish(step), self._timeout_s, add)
        self._last = folder / tag
        self.num_saved += 1
        self.longest_stall_s = max(self.longest_stall_s, time.perf_counter() - began_s)

    def _prepare(self, step: int, data_state: DataState, num_bytes: int) -> str | None:
        """Make the folder of a checkpoint with its facts; returns why it cannot be written, or None."""
        folder = self._checkpoints.folder
        place = folder / f"step_{step}"
        facts = {"ranks": self._world.size, "step": step, "data": data_state, "options": dict(self._checkpoints.options)}
        facts |= {"target_identity": self._checkpoints.target_identity, "checksums": True}
        facts["schedule"] = dict(self._checkpoints.schedule)
        try:
            with writing(place):
                # A run that was killed while saving may have left a part of this checkpoint.
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                free_bytes = shutil.disk_usage(place).free
            if free_bytes < num_bytes + SPARE_BYTES:
                place.rmdir()
                return f"it needs {num_bytes / 1e9:.2f} GB, and {free_bytes / 1e9:.2f} GB are free; free some space"
            write_json(place / RUN, facts)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            return str(error)
        return None

    def finish(self) -> bool:
        """Wait until the last checkpoint is written; a collective. Returns whether it is complete, if there was one."""
        if self.num_saved == 0:
            return self._is_complete
        outcome = self._draft.files.finish()
        if outcome is not None:
            self._is_complete = self._world.decide(lambda: outcome.problem is None)  # rank 0 knows of all ranks
            step = int(outcome.folder.name.removeprefix("step_"))
            if outcome.problem is not None:
                self._warn_of(step, outcome.problem)
            elif outcome.warning is not None and self._world.is_main:
                missing = "its draft or `latest` was not written"
                self._warn(f"  the checkpoint of step {step} is complete, but {missing}: {outcome.warning}")
        return self._is_complete

    def wait_until_complete(self) -> None:
        """Wait, for a while, until the last checkpoint is complete on all ranks, before an error ends the job."""
        folder = self._last
        deadline_s = time.monotonic() + SECONDS_AFTER_ERROR
        while folder is not None and folder.exists() and not (folder / COMPLETE).exists():
            if time.monotonic() > deadline_s:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def summary(self) -> str:
        """Return a line for the log."""
        if self.num_saved == 0:
            return "no checkpoints"
        pause = f"the longest pause for one took {self.longest_stall_s:.2f} s"
        return f"{self.num_saved} checkpoints in {self._checkpoints.folder}; {pause}"

    def _warn_of(self, step: int, problem: str) -> None:
        if self._world.is_main:
            self._warn(f"  the checkpoint of step {step} was not written: {problem}. Training goes on; earlier ones are kept")


def check_finite_weights(draft: ZeroDraft, world: World, step: int) -> None:
    """Raise NonFiniteError on every rank if a weight is not finite after `step`; a collective."""
    if not draft.has_finite_weights(world):
        raise NonFiniteError(
            f"weights of the draft are not finite after step {step}. No checkpoint or draft was written, and earlier ones are "
            "kept. Resume from the newest checkpoint (checkpoint.resume=true) with a lower learning rate "
            "(optimizer.params.lr) or gradient_clipping"
        )


def _rng_state(world: World) -> dict[str, Any]:
    """Return the state of this rank's generators as plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    numpy_state = (kind, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest)
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
