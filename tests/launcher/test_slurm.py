"""The real batch files on a real Slurm of two nodes, on loopback: preempted and requeued, and with a node for each side."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import ENVIRONMENT, ROOT
from tests.test_trainer import arguments, metrics, num_logged, run
from tests.waiting import wait_until

CLUSTER = Path(__file__).parent / "two_nodes.sh"
SLURM = ROOT / "launcher" / "slurm"
# The nodes of the test share two cores and have no GPU.
SIZES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
OPTIONS = ("epochs=8", "evaluation.num_prompts=0")
SECONDS_FOR_JOB = 400
SECONDS_TO_SETTLE = 2.0  # in which the nodes forget a requeued job's earlier start
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of Slurm's commands for a cluster of two nodes."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    folder = tmp_path_factory.mktemp("slurm")
    command = ["timeout", "300", "bash", str(CLUSTER), "start", str(folder)]
    started = subprocess.run(command, capture_output=True, text=True, check=False)
    if started.returncode:
        pytest.skip(f"Slurm cannot be installed or started here: {started.stderr.strip()[-300:]}")
    own = {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "DRAFTSPEED": str(ROOT)}
    yield os.environ | ENVIRONMENT | own
    subprocess.run(["bash", str(CLUSTER), "stop", str(folder)], check=True)


def slurm(cluster: dict[str, str], *command: str, check: bool = True) -> str:
    done = subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout.strip()


def without_prompts(command: list[str]) -> list[str]:
    return [word for word in command if "num_prompts" not in word]


def submit(cluster: dict[str, str], log: Path, command: list[str]) -> str:
    return slurm(cluster, "sbatch", "--parsable", *SIZES, f"--output={log}", str(SLURM / "train.sbatch"), *command)


def state_of(cluster: dict[str, str], job: str) -> str:
    """As Slurm names it. `squeue` lists no job that has ended, and none that is between two starts."""
    shown = slurm(cluster, "scontrol", "show", "job", job)
    return re.search(r"JobState=(\w+)", shown)[1]


def wait_for(cluster: dict[str, str], job: str, log: Path) -> None:
    """Wait until a job has ended well. A requeued job would wait for two minutes before it begins."""
    deadline_s = time.monotonic() + SECONDS_FOR_JOB
    while (state := state_of(cluster, job)) not in ENDED:
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(SECONDS_TO_SETTLE)
        if state == "PENDING":
            # Slurm refuses this if the job has begun since then.
            slurm(cluster, "scontrol", "update", f"job={job}", "StartTime=now", check=False)
    assert state == "COMPLETED", log.read_text()


def wait_for_steps(cluster: dict[str, str], job: str, folder: Path, log: Path) -> None:
    """Wait until a job has taken a few steps."""

    def has_not_ended() -> bool:
        return state_of(cluster, job) not in ENDED

    wait_until(lambda: num_logged(folder) >= 4, SECONDS_FOR_JOB, has_not_ended, log.read_text, pause_s=0.05)


def test_a_preempted_job_on_two_nodes_ends_as_one_on_a_single_node(cluster, tmp_path, tiny_target, tiny_corpus):
    alone = tmp_path / "alone"
    run([*without_prompts(arguments(alone, tiny_target, tiny_corpus)), *OPTIONS], ranks=2)
    folder = tmp_path / "preempted"
    log = tmp_path / "log"
    command = [*without_prompts(arguments(folder, tiny_target, tiny_corpus)), *OPTIONS]
    job = submit(cluster, log, command[1:])
    wait_for_steps(cluster, job, folder, log)
    slurm(cluster, "scontrol", "requeue", job)
    wait_for(cluster, job, log)
    printed = log.read_text()
    assert "stopped by SIGTERM after step" in printed and "resumed after step" in printed
    assert metrics(folder) == metrics(alone)
    weights = [(path / "draft" / "model.safetensors").read_bytes() for path in (folder, alone)]
    assert weights[0] == weights[1]


def test_a_job_that_gets_the_signal_before_its_time_limit_requeues_itself(cluster, tmp_path, tiny_target, tiny_corpus):
    folder = tmp_path / "limited"
    log = tmp_path / "log"
    command = [*without_prompts(arguments(folder, tiny_target, tiny_corpus)), "epochs=40", "evaluation.num_prompts=0"]
    job = submit(cluster, log, [*command[1:], "max_steps=400"])
    wait_for_steps(cluster, job, folder, log)
    slurm(cluster, "scancel", "--signal=USR1", job)
    wait_until(lambda: state_of(cluster, job) == "PENDING", SECONDS_FOR_JOB, tell=log.read_text, pause_s=0.1)
    assert "stopped by SIGUSR1 after step" in log.read_text() and "requeueing it" in log.read_text()
    slurm(cluster, "scancel", job)


def test_target_and_draft_may_each_have_a_node(cluster, tmp_path, tiny_target, tiny_corpus):
    alone = tmp_path / "alone"
    run([*without_prompts(arguments(alone, tiny_target, tiny_corpus)), *OPTIONS, "overlap.placement=serial"])
    folder = tmp_path / "split"
    log = tmp_path / "log"
    command = [*without_prompts(arguments(folder, tiny_target, tiny_corpus)), *OPTIONS]
    job = submit(cluster, log, [*command[1:], "overlap.placement=split", "overlap.target_ranks=1"])
    wait_for(cluster, job, log)
    assert metrics(folder) == metrics(alone)


@pytest.mark.parametrize("name", ["start_ranks.sh", "train.sbatch", "capture.sbatch"])
def test_the_files_are_valid(name):
    subprocess.run([shutil.which("bash"), "-n", str(SLURM / name)], check=True)
