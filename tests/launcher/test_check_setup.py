"""The whole command on real ranks: what it prints, and that nothing is left of it."""

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.models.draft_folder import VOCAB
from engine.setup_checks.check_list import TEMPORARY
from tests.distributed import launch, launch_and
from tests.step_plugins import before_each_step
from tests.waiting import wait_until

COMMAND = "launcher/check_setup.py"
# The command, whose ranks wait in the first step of the trial run.
WAITING = (
    before_each_step("""
Path({folder!r}, str(rank)).touch()
time.sleep(600)
""")
    + """
import runpy, sys

sys.argv[0] = {command!r}
runpy.run_path({command!r}, run_name="__main__")
"""
)


def temporary_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"))


@pytest.fixture
def nothing_left() -> Iterator[set[Path]]:
    """Temporary folders of other commands; a test that leaves one of its own fails."""
    others = temporary_folders()
    yield others
    assert temporary_folders() <= others


def test_two_ranks_are_ready_and_print_one_object(tmp_path, nothing_left):
    folder = tmp_path / "outputs"
    ended = launch([COMMAND, "--json", "--folder", str(folder)], ranks=2)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert report["status"] == "ready" and report["num_problems"] == 0 and report["summary"].startswith("ready")
    names = {finding["name"] for finding in report["findings"]}
    assert names >= {
        "Python",
        "torch",
        "/dev/shm",
        "ranks",
        "all-reduce",
        "all-to-all",
        "disk speed",
        "models",
        "kernels",
        "training",
    }
    assert [rank["rank"] for rank in report["facts"]["ranks"]] == [0, 1]
    assert all(link["bus_gb_per_s"] > 0 for link in report["facts"]["links"])
    assert len(report["facts"]["training"]) == 2 and report["facts"]["training"][1]["loss"] > 0
    assert not folder.exists()


def test_an_interrupted_check_names_all_problems_and_leaves_no_files(tmp_path, nothing_left):
    file = tmp_path / "file"
    file.touch()
    training = tmp_path / "training"  # ranks that are in a step create a file here
    training.mkdir()
    script = tmp_path / "waiting.py"
    script.write_text(WAITING.format(folder=str(training), command=COMMAND))

    def interrupt(processes: list[Any]) -> None:
        wait_until(lambda: len(list(training.iterdir())) >= 2, 240, processes[0].is_alive)
        assert any((folder / "run" / VOCAB).exists() for folder in temporary_folders() - nothing_left)
        os.kill(processes[1].pid, signal.SIGTERM)

    ended = launch_and(interrupt, [str(script), "--folder", str(file / "outputs"), "--ds_config", "zero0"], ranks=2)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "ended by SIGTERM" in ended.stderr and "Traceback" not in ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    disk, training = [" ".join(line) for line in lines if line[0] == "problem"]
    assert disk.startswith("problem disk ") and "cannot be written" in disk
    assert training.startswith("problem Training was ended before it had finished")
    assert ["ok", "kernels"] in [line[:2] for line in lines], "checks after the problem run"
    assert ended.stdout.splitlines()[-1].startswith("not ready: 2 problems")
