"""Faults of a real run: it is killed, its disk is full, its checkpoints are damaged, another run writes its folder.

After each of them the resumed run equals the uninterrupted one.
"""

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from engine.host.folder_lock import hold_folder
from tests.distributed import NUM_KILLS, launch, launch_and
from tests.runtime.test_checkpoint import flip_a_bit
from tests.step_plugins import before_each_step
from tests.test_trainer import arguments, metrics, num_logged, run
from tests.waiting import wait_until

RANKS = 2
OPTIONS = ("epochs=3", "checkpoint.every_steps=4", "evaluation.num_prompts=0", "parallel.hang_s=20")


def command_of(folder: Path, target: Path, corpus, *options: str) -> list[str]:
    command = [word for word in arguments(folder, target, corpus) if "num_prompts" not in word]
    return [*command, *OPTIONS, *options]


def left_by(folder: Path) -> tuple[bytes, list[dict]]:
    return (folder / "draft" / "model.safetensors").read_bytes(), metrics(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_target, tiny_corpus) -> tuple[bytes, list[dict]]:
    """What a run leaves behind that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(command_of(folder, tiny_target, tiny_corpus), RANKS)
    return left_by(folder)


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(whole, tmp_path, tiny_target, tiny_corpus):
    """Before a checkpoint, while one is written, while the draft is exported: wherever one of the ranks is by then."""
    command = command_of(tmp_path, tiny_target, tiny_corpus, "checkpoint.resume=auto")
    generator = random.Random(NUM_KILLS)
    num_steps = len(whole[1])
    num_effective = 0
    for kill in range(NUM_KILLS):
        after = num_steps * (kill + generator.random()) / NUM_KILLS
        victim = generator.randrange(RANKS)

        def kill_one(processes, after=after, victim=victim) -> None:
            deadline_s = time.monotonic() + 240
            while num_logged(tmp_path) <= after:
                if time.monotonic() > deadline_s or not processes[victim].is_alive():
                    return
                time.sleep(0.002)
            time.sleep(0.05 * generator.random())
            processes[victim].kill()

        ended = launch_and(kill_one, command, RANKS)
        assert ended.returncode in (0, 1, -9), ended.stderr
        num_effective += ended.returncode != 0
    assert num_effective >= NUM_KILLS - 2, "the others came after the end of the run"
    run(command, RANKS)
    assert left_by(tmp_path) == whole
    assert not list(tmp_path.rglob("*.writing")) and len(list((tmp_path / "checkpoints").glob("step_*"))) == 2


# The run waits in step 9, so that nothing is written after the checkpoint of step 8.
WAITING = before_each_step("""
if step == 9:
    time.sleep(600)
""")


@pytest.fixture(scope="module")
def half(tmp_path_factory, tiny_target, tiny_corpus, whole) -> Path:
    """The folder of a run that was killed in step 9, with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("half")
    latest = folder / "checkpoints" / "latest"
    plugin = tmp_path_factory.mktemp("waiting") / "waiting.py"
    plugin.write_text(WAITING)

    def kill_all(processes) -> None:
        wait_until(lambda: latest.exists() and latest.read_text() == "step_8", 240, processes[0].is_alive)
        for process in processes:
            process.kill()

    launch_and(kill_all, command_of(folder, tiny_target, tiny_corpus, f"target.plugins=[{plugin}]"), RANKS)
    return folder


def test_a_flipped_bit_is_found_and_the_run_resumes_from_the_checkpoint_before(half, whole, tmp_path, tiny_target, tiny_corpus):
    folder = tmp_path / "run[1]"  # DeepSpeed takes the path of a checkpoint for a pattern
    shutil.copytree(half, folder)
    newest, before = sorted((folder / "checkpoints").glob("step_*"), key=lambda path: -int(path.name[5:]))[:2]
    damaged = next(path for path in sorted(newest.glob("*optim_states.pt")))
    flip_a_bit(damaged)
    ended = launch(command_of(folder, tiny_target, tiny_corpus, "checkpoint.resume=auto"), RANKS)
    assert ended.returncode == 0, ended.stderr
    assert f"{newest}: the contents of {damaged.name} have changed" in ended.stderr
    assert f"resumed after step {before.name[5:]}" in ended.stdout
    assert left_by(folder) == whole


def test_a_folder_that_another_run_writes_is_refused_by_name(half, tmp_path, tiny_target, tiny_corpus):
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    before = (folder / "metrics.jsonl").read_bytes()
    fresh = launch(command_of(folder, tiny_target, tiny_corpus), RANKS)
    assert fresh.returncode == 1 and "set checkpoint.resume=true" in fresh.stderr, (
        "an earlier run's checkpoints are not mixed up"
    )
    with hold_folder(folder):
        ended = launch(command_of(folder, tiny_target, tiny_corpus, "checkpoint.resume=auto"), RANKS)
    assert ended.returncode == 1 and ended.stderr.count(f"is being written by process {os.getpid()} on") == 1
    assert (folder / "metrics.jsonl").read_bytes() == before


# Rank 0 fills the disk between two steps, when no checkpoint is being written.
FILLING = before_each_step("""
latest = Path({latest!r})
ballast = Path({ballast!r})
if rank == 0 and latest.exists() and not ballast.exists():
    free_bytes = shutil.disk_usage(ballast.parent).free
    ballast.write_bytes(bytes(max(0, free_bytes - (1 << 20))))
""")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(whole, tmp_path, tiny_target, tiny_corpus):
    """On a file system of a few megabytes, filled after the first checkpoint and freed later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    folder = disk / "run"
    ballast = disk / "ballast"
    plugin = tmp_path / "filling.py"
    plugin.write_text(FILLING.format(latest=str(folder / "checkpoints" / "latest"), ballast=str(ballast)))
    options = ["checkpoint.keep=1", f"target.plugins=[{plugin}]"]
    try:
        ended = launch(command_of(folder, tiny_target, tiny_corpus, *options), RANKS)
        assert ended.returncode == 0, ended.stderr
        assert "was not written: it needs" in ended.stderr and "Training goes on" in ended.stderr
        assert left_by(folder) == whole
        ballast.unlink()
        shutil.rmtree(folder / "draft")
        run(command_of(folder, tiny_target, tiny_corpus, "checkpoint.resume=true"), RANKS)
        assert left_by(folder) == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)


POISON = """
from engine.hidden_states import micro_batches

whole = micro_batches.MicroBatchMaker.finish

def finish(self, rows, output):
    micro = whole(self, rows, output)
    if rows.batch.document_ids and {document} in rows.batch.document_ids:
        start = micro.batch.cu_seqlens[list(rows.batch.document_ids).index({document})]
        micro.embed_TD[start : start + 5] = float("nan")
    return micro

micro_batches.MicroBatchMaker.finish = finish
"""


def test_a_bad_step_is_skipped_or_stops_and_its_documents_can_be_replayed(tmp_path, tiny_target, tiny_corpus):
    plugin = tmp_path / "poison.py"
    plugin.write_text(POISON.format(document=7))
    folder = tmp_path / "skipping"
    options = [f"target.plugins=[{plugin}]", "checkpoint.on_bad_step=skip"]
    ended = launch(command_of(folder, tiny_target, tiny_corpus, *options), RANKS)
    assert ended.returncode == 0, ended.stderr
    lists = sorted((folder / "bad_steps").iterdir())
    assert (
        len([path for path in lists if "loss" in path.read_text()]) <= len(lists) and "its gradient is dropped" in ended.stderr
    )
    bad = next(path for path in lists if '"index": 7,' in path.read_text())
    replayed = launch(["launcher/replay_batch.py", str(folder), str(bad), "--plugins", str(plugin)])
    assert replayed.returncode == 0, replayed.stderr
    assert "1 of" in replayed.stdout and "documents are bad alone" in replayed.stdout, replayed.stdout
    stopping = tmp_path / "stopping"
    ended = launch(command_of(stopping, tiny_target, tiny_corpus, options[0]), RANKS)
    assert ended.returncode == 1 and "the draft's loss is not finite" in ended.stderr
    assert "for launcher/replay_batch.py" in ended.stderr and list((stopping / "bad_steps").iterdir())
    assert not (stopping / "draft").exists()
