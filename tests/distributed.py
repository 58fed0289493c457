"""Run a function in several real processes that share a process group."""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine.parallel.mesh import World

# One GPU cannot hold several ranks, and DeepSpeed chooses its accelerator when it is first imported.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TIMEOUT_S = 60

# Every rank is forked from one server that has imported DeepSpeed, which takes seconds, once.
multiprocessing.set_forkserver_preload(["engine.parallel.zero"])


def run_ranks(job: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """What `job(world, *arguments)` returns on each of `size` ranks, by rank.

    job: a function of a module's top level. Raises what the first failing rank raised, with its traceback, and ends the others.
    """
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ENVIRONMENT):
        shared = (size, free_port(), Path(folder), job, arguments)
        torch.multiprocessing.start_processes(_run_rank, shared, nprocs=size, start_method="forkserver")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(size)]


def _run_rank(rank: int, size: int, port: int, folder: Path, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from engine.parallel.zero import connect

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    connect(world, timeout_s=TIMEOUT_S, cpu_threads=1)
    torch.save(job(world, *arguments), folder / str(rank))
    world.barrier()
    torch.distributed.destroy_process_group()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
