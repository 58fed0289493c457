"""A resumed run is the uninterrupted one, bit for bit; a checkpoint is complete or it is not named."""

import errno
import json
import os
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.ds_config import load_ds_config, resolve_ds_config
from engine.hidden_states.finite import NonFiniteError
from engine.host import checkpoint_files
from engine.host.checkpoint_files import COMPLETE, CheckpointFiles
from engine.host.files import WriteError
from engine.models.normaliser import Normaliser
from engine.parallel.mesh import World
from engine.parallel.zero import ZeroDraft
from engine.parallel.zero_checkpoint import CheckpointForm, consolidated_weights, to_universal
from engine.runtime.checkpoint import STAGE, BrokenCheckpointError, Checkpoint, Checkpoints, CheckpointWriter
from tests.distributed import run_ranks
from tests.tiny import make_draft, make_micro, make_test
from tests.training import FOLDER, zero_step

STAGES = ("zero0", "zero1", "zero2", "zero3")
RUNS = (*STAGES, "zero2 muon", "zero3 muon")
ALONE = World.alone()
Weights = dict[str, torch.Tensor]


def ds_config_of(run: str) -> dict[str, Any]:
    """The shipped configuration of a stage; a name that ends with "muon" has this optimizer."""
    stage, _, optimizer = run.partition(" ")
    raw = load_ds_config(FOLDER / f"{stage}.json")
    if optimizer:
        del raw["gradient_clipping"]
        raw["optimizer"] = {"type": "Muon", "params": {}}
        raw["zero_optimization"]["reduce_scatter"] = False
    return raw


def start(world: World, stage: str, seed: int, total_steps: int = 6) -> ZeroDraft:
    """A new run: a draft with a frozen projection, the shipped configuration in bf16 with its schedule, its own RNG a rank."""
    raw = ds_config_of(stage)
    raw["gradient_accumulation_steps"] = 2
    ds_config = resolve_ds_config(raw, world_size=world.size, total_steps=total_steps, hidden_size=24)
    zero = ZeroDraft(make_draft(hidden_size=24, seed=seed), make_test(), ds_config)
    seed_all(seed + world.rank)
    return zero


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw() -> int:
    """A number that all three generators have a part in."""
    return random.randrange(1000) + np.random.randint(1000) + int(torch.randint(1000, ()))


def train(zero: ZeroDraft, world: World, num_steps: int) -> list[float]:
    """Losses on batches that the rank's RNG chooses."""
    normalise = Normaliser(zero.objective, zero.forward, world)
    losses = []
    for _ in range(num_steps):
        micros = [make_micro(zero.objective, seed=draw(), dtype=zero.dtype) for _ in range(zero.accumulation_steps)]
        losses.append(zero_step(zero, normalise, world, micros))
    return losses


def train_and_save(world: World, folder: Path) -> dict[str, tuple[list[float], Weights, Weights]]:
    """For each stage, losses and weights of six steps, and the weights of another run that is saved after three."""
    results = {}
    for stage in RUNS:
        whole = start(world, stage, seed=0)
        losses = train(whole, world, 6)
        weights = dict(whole.gathered_weights())
        half = start(world, stage, seed=0)
        train(half, world, 3)
        save(Checkpoints(folder / stage), half, world, 3, {"position": 3})
        results[stage] = losses, weights, dict(half.gathered_weights())
    return results


def resume_and_train(world: World, folder: Path) -> dict[str, tuple[tuple[int, dict], list[float], Weights]]:
    """For each stage, what three more steps of a new process give that began with another draft and another RNG."""
    results = {}
    for stage in RUNS:
        zero = start(world, stage, seed=7)
        checkpoint = world.decide(lambda stage=stage: found(Checkpoints(folder / stage)))
        checkpoint.load(zero, world)
        results[stage] = (checkpoint.step, checkpoint.data_state), train(zero, world, 3), dict(zero.gathered_weights())
    return results


def save(checkpoints: Checkpoints, draft: Any, world: World, step: int, data_state: dict[str, Any]) -> list[str]:
    """Save a checkpoint and wait for it; returns the warnings."""
    warnings: list[str] = []
    writer = CheckpointWriter(checkpoints, draft, world, warnings.append)
    writer.save(step, data_state)
    assert writer.finish() == (not warnings)
    return warnings


def found(checkpoints: Checkpoints, warnings: list[str] | None = None) -> Checkpoint | None:
    return checkpoints.find([].append if warnings is None else warnings.append)


def rates(zero: ZeroDraft, world: World, num_steps: int) -> list[float]:
    """Learning rate of each of `num_steps` optimizer steps."""
    rates = []
    for _ in range(num_steps):
        train(zero, world, 1)
        rates.append(zero.learning_rate)
    return rates


def extend(world: World, folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """For each stage, rates of an uninterrupted run, and of one that was planned shorter and then extended."""
    results = {}
    for stage in ("zero0", "zero1", "zero3"):
        whole = rates(start(world, stage, seed=0, total_steps=9), world, 6)
        short = start(world, stage, seed=0, total_steps=4)
        before = rates(short, world, 4)
        save(Checkpoints(folder / stage), short, world, 4, {})
        longer = start(world, stage, seed=0, total_steps=9)
        found(Checkpoints(folder / stage)).load(longer, world)
        results[stage] = whole, [*before, *rates(longer, world, 2)]
    return results


def test_an_extended_run_follows_the_new_schedule_from_its_first_step_on(tmp_path):
    for stage, (whole, extended) in run_ranks(extend, 1, tmp_path)[0].items():
        assert extended[4:] == whole[4:], stage
        assert extended[3] != whole[3], f"{stage}: the shorter run had another schedule"


def test_a_run_that_ends_before_its_checkpoint_is_refused(tmp_path):
    save(Checkpoints(tmp_path), PaperDraft(), ALONE, 40, {})
    checkpoint = found(Checkpoints(tmp_path))
    checkpoint.check_end(None)
    checkpoint.check_end(40)
    with pytest.raises(ValueError, match=r"step_40 was saved after step 40, and max_steps=39 ends the run before it"):
        checkpoint.check_end(39)


def start_shared(world: World, stage: str, seed: int, reshaped_from: Checkpoint | None = None) -> ZeroDraft:
    """A run whose global batch is the same four micro-batches on one, two and four ranks."""
    raw = ds_config_of(stage)
    raw["gradient_accumulation_steps"], raw["bf16"]["enabled"] = 4 // world.size, False
    ds_config = resolve_ds_config(raw, world_size=world.size, total_steps=6, hidden_size=24)
    draft = make_draft(hidden_size=24, seed=seed)
    form = CheckpointForm.OWN if reshaped_from is None else reshaped_from.reshape(draft, world, int(stage[4]))
    return ZeroDraft(draft, make_test(), ds_config, form)


def train_shared(zero: ZeroDraft, world: World, steps: range) -> list[float]:
    normalise = Normaliser(zero.objective, zero.forward, world)
    losses = []
    for step in steps:
        micros = [make_micro(zero.objective, seed=10 * step + index, dtype=zero.dtype) for index in range(4)]
        losses.append(zero_step(zero, normalise, world, micros[world.rank :: world.size]))
    return losses


def train_shared_and_save(world: World, folder: Path) -> dict[str, tuple[list[float], Weights]]:
    """For each stage, the losses of steps 3 to 5 and the weights after them; saved before."""
    results = {}
    for stage in STAGES:
        zero = start_shared(world, stage, seed=0)
        train_shared(zero, world, range(3))
        save(Checkpoints(folder / stage, options={STAGE: int(stage[-1])}), zero, world, 3, {})
        results[stage] = train_shared(zero, world, range(3, 6)), dict(zero.gathered_weights())
    return results


def resume_shared(world: World, folder: Path) -> dict[str, tuple[list[float], Weights]]:
    results = {}
    for stage in STAGES:
        checkpoint = world.decide(lambda stage=stage: found(Checkpoints(folder / stage)))
        zero = start_shared(world, stage, seed=7, reshaped_from=checkpoint)
        checkpoint.load(zero, world)
        results[stage] = train_shared(zero, world, range(3, 6)), dict(zero.gathered_weights())
    return results


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("shared")
    return folder, run_ranks(train_shared_and_save, 2, folder)[0]


def test_a_run_goes_on_on_more_ranks(on_two_ranks):
    """That it goes on on fewer is shown by a whole run in `test_trainer.py`."""
    folder, uninterrupted = on_two_ranks
    resumed = run_ranks(resume_shared, 4, folder)[0]
    for stage in STAGES:
        (losses, weights), (own_losses, own_weights) = uninterrupted[stage], resumed[stage]
        assert own_losses == pytest.approx(losses, rel=1e-5), stage
        assert weights.keys() == own_weights.keys() and "embed_projection.weight" in weights
        for name in weights:  # as the same sums in another order differ
            torch.testing.assert_close(own_weights[name], weights[name], rtol=1e-4, atol=1e-5)
        assert [path.name for path in (folder / stage).iterdir() if path.is_dir()] == ["step_3"], "nothing is left of rewriting"


# Saved and resumed stages, by the number of ranks that resume; converting a checkpoint takes seconds, so each pair occurs once.
OTHER_STAGES = {
    2: (("zero1", "zero2"), ("zero2", "zero3"), ("zero3", "zero2_offload")),
    1: (("zero2", "zero1"), ("zero3", "zero1")),
}


def resume_on_other_stages(world: World, folder: Path) -> dict[tuple[str, str], list[float]]:
    losses = {}
    for saved, stage in OTHER_STAGES[world.size]:
        checkpoint = world.decide(lambda saved=saved: found(Checkpoints(folder / saved)))
        checkpoint.check_options({STAGE: int(stage[4])})
        zero = start_shared(world, stage, seed=7, reshaped_from=checkpoint)
        checkpoint.load(zero, world)
        losses[saved, stage] = train_shared(zero, world, range(3, 6))
    return losses


def test_a_run_goes_on_under_another_stage_or_is_refused(on_two_ranks):
    folder, uninterrupted = on_two_ranks
    for num_ranks in OTHER_STAGES:
        for (saved, stage), losses in run_ranks(resume_on_other_stages, num_ranks, folder)[0].items():
            assert losses == pytest.approx(uninterrupted[saved][0], rel=1e-5), (num_ranks, saved, stage)
    with pytest.raises(ValueError, match="zero_optimization.stage was 2, now 0"):
        found(Checkpoints(folder / "zero2")).check_options({STAGE: 0})
    of_muon = replace(found(Checkpoints(folder / "zero2")), options={"optimizer.type": "Muon", STAGE: 2})
    with pytest.raises(ValueError, match="zero_optimization.stage was 2, now 3"):
        of_muon.check_options({"optimizer.type": "Muon", STAGE: 3})
    with pytest.raises(ValueError, match="Muon's momentum.* on 2 ranks and ZeRO stage 2"):
        of_muon.reshape(make_draft(), ALONE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder) -> dict[str, tuple[list[float], Weights, Weights]]:
    return run_ranks(train_and_save, 2, folder)[0]


@pytest.fixture(scope="module")
def resumed(saved, folder) -> dict[str, tuple[tuple[int, dict], list[float], Weights]]:
    """Resumed beside a later checkpoint that a kill cut short: its first file is there, others and its name are not."""
    for stage in RUNS:
        (folder / stage / "step_6").mkdir()
        part = sorted((folder / stage / "step_3").glob("*.pt"))[0]
        shutil.copy(part, folder / stage / "step_6")
    return run_ranks(resume_and_train, 2, folder)[0]


@pytest.mark.parametrize("stage", RUNS)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(saved, resumed, stage):
    losses, weights, _ = saved[stage]
    position, resumed_losses, resumed_weights = resumed[stage]
    assert position == (3, {"position": 3})
    assert resumed_losses == losses[3:]
    assert weights.keys() == resumed_weights.keys()
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


@pytest.mark.parametrize("stage", RUNS)
def test_consolidated_weights_are_the_gathered_ones_in_fp32(saved, folder, capfd, stage):
    assert not torch.distributed.is_initialized()
    gathered = saved[stage][2]
    consolidated = consolidated_weights(folder / stage, "step_3")
    assert "embed_projection.weight" in gathered, "frozen, so no optimizer holds it"
    assert consolidated.keys() == gathered.keys()
    for name, weight in consolidated.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.to(gathered[name].dtype), gathered[name]), name
    assert capfd.readouterr() == ("", "")


class PaperDraft:
    """Stands in for a ZeroDraft: its checkpoint is its client state."""

    def __init__(self, is_finite: bool = True) -> None:
        self.is_finite = is_finite
        self.files = CheckpointFiles(0, 1, lambda path, device: torch.load(path, map_location=device, weights_only=True))

    def has_finite_weights(self, world: World) -> bool:
        return self.is_finite

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        self.files.create(None)
        self.files.save(client_state | {"weights": torch.ones(5000)}, str(folder / tag / "state.pt"))

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        return self.files.load(str(folder / tag / "state.pt"))


def tags(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.glob("step_*"))


def test_nothing_saved_is_nothing_to_resume(tmp_path):
    assert found(Checkpoints(tmp_path / "none")) is None


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    for step in (8, 9, 10, 11):
        save(checkpoints, PaperDraft(), ALONE, step, {})
    assert tags(checkpoints) == ["step_10", "step_11"]
    assert found(checkpoints).tag == (tmp_path / "run" / "latest").read_text() == "step_11"


def test_a_failed_save_leaves_the_previous_checkpoint_named_and_kept(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, PaperDraft(), ALONE, 3, {"position": 3})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "write_state", full_disk)
        (warning,) = save(checkpoints, PaperDraft(), ALONE, 9, {})
    assert "the checkpoint of step 9 was not written" in warning and "No space left" in warning
    assert found(checkpoints).data_state == {"position": 3} and tags(checkpoints) == ["step_3"]
    (tmp_path / "step_9").mkdir()
    save(checkpoints, PaperDraft(), ALONE, 5, {"position": 5})
    assert found(checkpoints).step == 5, "pruning kept the unfinished step_9 instead"


def test_no_checkpoint_is_made_of_weights_that_are_not_finite_and_none_is_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, PaperDraft(), ALONE, 3, {})
    with pytest.raises(NonFiniteError, match="not finite after step 9"):
        save(checkpoints, PaperDraft(is_finite=False), ALONE, 9, {})
    assert tags(checkpoints) == ["step_3"] and found(checkpoints).tag == "step_3"


def poison(world: World) -> dict[str, list[bool]]:
    """For each stage, whether the weights of a draft are found finite before and after one of them is not."""
    found = {}
    for stage in STAGES:
        zero = start(world, stage, seed=0)
        before = zero.has_finite_weights(world)
        weight = zero.engine.module.draft.fc.weight
        own = getattr(weight, "ds_tensor", weight)
        if world.is_main:
            own.data.view(-1)[5] = float("nan")
        found[stage] = [before, zero.has_finite_weights(world)]
    return found


def test_a_weight_that_is_not_finite_on_one_rank_is_found_on_all():
    for rank in run_ranks(poison, 2):
        assert rank == {stage: [True, False] for stage in STAGES}


def test_every_generator_is_restored(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, PaperDraft(), ALONE, 1, {})
    numbers = [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(3)]
    seed_all(99)
    found(checkpoints).load(PaperDraft(), ALONE)
    assert numbers == [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(3)]


def test_a_checkpoint_that_cannot_be_converted_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "decide", lambda world, decision: decision())  # rank 0, without the other three
    save(Checkpoints(tmp_path), PaperDraft(), ALONE, 4, {})
    checkpoint = found(Checkpoints(tmp_path))
    torch.save({}, tmp_path / "step_4" / "zero_optim_states.pt")
    with pytest.raises(ValueError, match=r"step_4 cannot be converted for another number of ranks or ZeRO stage: "):
        checkpoint.reshape(make_draft(), replace(ALONE, size=4))
    assert tags(Checkpoints(tmp_path)) == ["step_4"]
    old = replace(checkpoint, is_checked=False)
    with pytest.raises(ValueError, match=r"step_4 has no checksums, so it is not converted for 4 ranks"):
        old.reshape(make_draft(), replace(ALONE, size=4))


def test_a_checkpoint_of_another_target_is_refused_and_an_old_one_says_what_is_not_known(tmp_path):
    (tmp_path / "step_3").mkdir()
    (tmp_path / "latest").write_text("step_3")
    facts = {"ranks": 1, "step": 3, "data": {}, "options": {}}
    for saved, note in (({}, "checkpoint"), ({"target_identity": "config-weights"}, None)):
        (tmp_path / "step_3" / "run.json").write_text(json.dumps(facts | saved))
        checkpoint = found(Checkpoints(tmp_path))
        problem = checkpoint.check_target("config-weights")
        assert problem is None if note is None else problem.startswith(f"the {note} does not record")
    assert checkpoint.check_target(None).startswith("the store does not record")
    with pytest.raises(ValueError, match="step_3 was trained for another target: the target's weights differ"):
        checkpoint.check_target("config-others")


def test_other_options_are_refused_by_name(tmp_path):
    options = {"ttt.steps": 7, "loss.step_weights": (1.0, 0.5), "loss.kind": "kl"}
    save(Checkpoints(tmp_path), PaperDraft(), ALONE, 4, {})
    save(Checkpoints(tmp_path, 1, options), PaperDraft(), ALONE, 4, {})
    checkpoint = found(Checkpoints(tmp_path))
    checkpoint.check_options(options)
    with pytest.raises(ValueError, match="step_4 was trained with other options: ttt.steps was 7, now 3. Restore"):
        checkpoint.check_options(options | {"ttt.steps": 3})
    later = options | {"target.fp8_activations": False}  # an option that came after the run
    checkpoint.check_options(later)
    with pytest.raises(ValueError, match="target.fp8_activations was False, now True"):
        checkpoint.check_options(later | {"target.fp8_activations": True})
    checkpoint.check_options(options | {"optimizer.params.betas": [0.9, 0.95]})  # a key of DeepSpeed's that was not recorded
    spelt_before = {"objective.kl": 0.0, "objective.selector_inject": False, "block.anchors": None}
    spelt_now = {"objective.kl": None, "objective.selector_inject": None, "block.anchors": "all"}
    before = replace(checkpoint, options=checkpoint.options | spelt_before)
    before.check_options(options | spelt_now)
    with pytest.raises(ValueError, match="objective.kl was 0.0, now 0.5"):
        before.check_options(options | spelt_now | {"objective.kl": 0.5})
    with pytest.raises(ValueError, match="objective.parity was none"):
        before.check_options(options | spelt_now | {"objective.parity": "speculators"})


def test_another_curve_of_the_learning_rate_is_said(tmp_path):
    schedule = {"optimizer.params.lr": 1e-4, "last step": 100}
    save(Checkpoints(tmp_path, schedule=schedule), PaperDraft(), ALONE, 4, {})
    checkpoint = found(Checkpoints(tmp_path))
    assert checkpoint.changed_schedule(schedule) is None
    changed = checkpoint.changed_schedule(schedule | {"last step": 200})
    assert changed.endswith("on another curve: last step was 100, now 200")
    assert replace(checkpoint, schedule=None).changed_schedule(schedule) is None


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda place: flip_a_bit(place / "state.pt"),
    "a flipped bit of the facts": lambda place: flip_a_bit(place / "run.json"),
    "a truncated file": lambda place: (place / "state.pt").write_bytes(b"cut off"),
    "a missing file": lambda place: (place / "state.pt").unlink(),
    "no facts": lambda place: (place / "run.json").unlink(),
    "no marker": lambda place: (place / COMPLETE).unlink(),
    "a damaged marker": lambda place: (place / COMPLETE).write_bytes(b'{"files": {"a": 3}}'),
    "an empty marker": lambda place: (place / COMPLETE).write_bytes(b""),
    "nothing": lambda place: shutil.rmtree(place),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("latest", ["step_3", "step_9", None, "../step_3"])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, damage, latest):
    """Whatever `latest` says."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (3, 9):
        save(checkpoints, PaperDraft(), ALONE, step, {"position": step})
    DAMAGE[damage](tmp_path / "step_9")
    if latest is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(latest)
    warnings = []
    assert found(checkpoints, warnings).data_state == {"position": 3}
    assert damage == "nothing" or (len(warnings) == 1 and "step_9" in warnings[0])


def test_a_checkpoint_of_an_earlier_version_counts_if_latest_names_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, PaperDraft(), ALONE, 3, {})
    (tmp_path / "step_3" / COMPLETE).unlink()
    facts = json.loads((tmp_path / "step_3" / "run.json").read_text())
    del facts["checksums"]
    (tmp_path / "step_3" / "run.json").write_text(json.dumps(facts))
    assert found(checkpoints).step == 3 and not found(checkpoints).is_checked
    (tmp_path / "latest").unlink()
    assert found(checkpoints) is None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_in_silence(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, PaperDraft(), ALONE, 3, {})
    flip_a_bit(tmp_path / "step_3" / "state.pt")
    with pytest.raises(ValueError, match=r"holds no checkpoint that is whole \(.*state.pt have changed\)"):
        found(checkpoints)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "damaged"),
        (b'{"ranks": 1, "step": 9, "da', "damaged"),
        (b"\xff", "damaged"),
        (b"[]", "expected int under 'ranks'"),
        (b'{"ranks": 1, "step": 9, "data": {}}', "expected dict under 'options', found None"),
        (b'{"ranks": "2", "step": 9, "data": {}, "options": {}}', "expected int under 'ranks', found '2'"),
        (b'{"ranks": 1, "step": 3, "data": {}, "options": {}}', "it is of step 3"),
    ],
)
def test_damaged_facts_of_an_old_checkpoint_are_named(tmp_path, content, problem):
    (tmp_path / "step_9").mkdir()
    (tmp_path / "latest").write_text("step_9")
    (tmp_path / "step_9" / "run.json").write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=r"step_9/run.json is damaged") as error:
        Checkpoint.read(tmp_path, "step_9")
    assert problem in str(error.value)


def full_disk(path: Path, state: Any) -> Any:
    path.write_bytes(b"a part of it")
    raise WriteError(path, os.strerror(errno.ENOSPC), errno.ENOSPC)


class HugeDraft(PaperDraft):
    """A draft whose checkpoint does not fit any disk, although it takes no memory here."""

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        super().save(folder, tag, client_state)
        self.files._saved[folder / tag / "huge.pt"] = torch.empty(1 << 60, device="meta")


def test_a_checkpoint_that_does_not_fit_is_not_begun(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, PaperDraft(), ALONE, 3, {})
    draft = HugeDraft()
    (warning,) = save(checkpoints, draft, ALONE, 9, {})
    assert "it needs" in warning and "GB are free" in warning
    assert tags(checkpoints) == ["step_3"] and draft.files.num_bytes == 0


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, monkeypatch):
    may_write = threading.Event()
    whole = checkpoint_files.write_state

    def write_late(path: Path, state: Any) -> Any:
        assert may_write.wait(20)
        return whole(path, state)

    monkeypatch.setattr(checkpoint_files, "write_state", write_late)
    files = CheckpointFiles(0, 1, lambda path, device: torch.load(path, weights_only=True))
    weights = torch.zeros(7)
    shared = weights[2:5]
    (tmp_path / "step_1").mkdir()
    files.save({"weights": weights, "part": [shared, {"count": [1]}]}, str(tmp_path / "step_1" / "state.pt"))
    files.write(tmp_path / "step_1", lambda: None, 10)
    weights += 1
    assert files.is_writing and checkpoint_files.problem_of(tmp_path / "step_1") is not None
    may_write.set()
    assert files.finish().problem is None and not files.is_writing
    assert checkpoint_files.problem_of(tmp_path / "step_1") is None
    state = files.load(str(tmp_path / "step_1" / "state.pt"))
    assert not state["weights"].any() and not state["part"][0].any() and state["part"][1] == {"count": [1]}


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "step_1").mkdir()
    torch.save({"module": {}, "trap": Trap()}, tmp_path / "step_1" / "mp_rank_00_model_states.pt")
    for read in (lambda: consolidated_weights(tmp_path, "step_1"), lambda: to_universal(tmp_path, "step_1")):
        with pytest.raises(ValueError, match="holds more than data"):
            read()
    assert not (tmp_path / "executed").exists()
