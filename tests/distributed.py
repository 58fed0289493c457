"""Run a function in several real processes that share a process group."""

import contextlib
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine.parallel.mesh import World

# One GPU cannot hold several ranks, and DeepSpeed chooses its accelerator when it is first imported.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TIMEOUT_S = 180
LAUNCH_TIMEOUT_S = 480
NUM_KILLS = int(os.environ.get("DRAFTSPEED_TEST_KILLS", "3"))  # of a process at random moments; CONTRIBUTING.md
GRACE_S = 30  # for the other ranks, once one has failed
ROOT = Path(__file__).resolve().parents[1]
# Tests run side by side. With a thread per core in each process, threads of one would spin while those of others compute.
ONE_THREAD = "parallel.cpu_threads=1"

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
NUM_PORTS = 300
FIRST_PORT = 10_000 + NUM_PORTS * (WORKER % 20)
PORTS = (FIRST_PORT + (os.getpid() + number) % NUM_PORTS for number in itertools.count())

# Every rank is forked from one server that has imported what the jobs need; else each rank would take seconds to import it.
multiprocessing.set_forkserver_preload(["tests.preloaded"])


def run_ranks(job: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """What `job(world, *arguments)` returns on each of `size` ranks, by rank.

    job: a function of a module's top level. Raises what the first failing rank raised, with its traceback, and ends the others.
    """
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ENVIRONMENT):
        shared = (size, free_port(), Path(folder), job, arguments)
        torch.multiprocessing.start_processes(_run_rank, shared, nprocs=size, start_method="forkserver")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(size)]


def start_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Start a function of a module's top level in a process that is forked as ranks are; returns the process."""
    with mock.patch.dict(os.environ, ENVIRONMENT):
        process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
        process.start()
    return process


def _run_rank(rank: int, size: int, port: int, folder: Path, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from engine.parallel.zero import connect

    os.environ.update(_place(rank, size, port))
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    connect(world, timeout_s=TIMEOUT_S, cpu_threads=1)
    torch.save(job(world, *arguments), folder / str(rank))
    world.barrier()
    torch.distributed.destroy_process_group()


def launch(command: Sequence[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a launcher, such as `["launcher/train.py", ...]`, and return what it printed.

    The processes are forked as those of `run_ranks` are, which saves each the seconds of its imports; unlike those of a user's
    command they have one hash seed. Several of them have the environment of `torchrun`.
    """
    return launch_and(lambda processes: None, command, ranks)


def launch_and(
    meanwhile: Callable[[list[Any]], None], command: Sequence[str], ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """`launch` that calls a function with the processes while they run."""
    context = multiprocessing.get_context("forkserver")
    environment = os.environ | ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ENVIRONMENT):
        shared = (ranks, free_port(), Path(folder), [str(part) for part in command], environment)
        processes = [context.Process(target=_run_script, args=(rank, *shared)) for rank in range(ranks)]
        try:
            for process in processes:
                process.start()
            meanwhile(processes)
            code = _wait(processes)
        finally:
            for process in processes:
                if process.is_alive():
                    os.killpg(process.pid, signal.SIGKILL)
                    process.join()
        stdout, stderr = ("".join(_text(folder, stream, rank) for rank in range(ranks)) for stream in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, code, stdout, stderr)


def _wait(processes: list[multiprocessing.Process]) -> int:
    """Wait for all processes, after a failure for `GRACE_S` only; returns the first exit code that is not 0."""
    code = 0
    deadline = time.monotonic() + LAUNCH_TIMEOUT_S
    while any(process.is_alive() for process in processes):
        assert code or time.monotonic() < deadline, f"the command did not end within {LAUNCH_TIMEOUT_S} s"
        if code and time.monotonic() > deadline:
            return code
        if not code:
            code = next((process.exitcode for process in processes if process.exitcode), 0)
            if code:
                deadline = time.monotonic() + GRACE_S
        time.sleep(0.01)
    return code or next((process.exitcode for process in processes if process.exitcode), 0)


def _text(folder: str, stream: str, rank: int) -> str:
    path = Path(folder, f"{stream}.{rank}")
    return path.read_text() if path.exists() else ""


def _run_script(rank: int, ranks: int, port: int, folder: Path, command: list[str], environment: dict[str, str]) -> None:
    os.setsid()  # so that its own processes can be ended with it
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if name not in _place(rank, ranks, port)})
    if ranks > 1:
        os.environ.update(_place(rank, ranks, port))
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        file = (folder / f"{stream}.{rank}").open("w", buffering=1)
        os.dup2(file.fileno(), descriptor)
        setattr(sys, stream, file)
    os.chdir(ROOT)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _place(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables by which a launcher such as `torchrun` tells a process its rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    """A port that nobody listens on.

    The port stays free until a process takes it: each worker of pytest-xdist has ports of its own, below those that the
    kernel gives to connections.
    """
    while True:
        port = next(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
