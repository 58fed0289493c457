"""Facts about the machine of a rank: GPUs, cores, memory and limits."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from engine.host.memory_limit import CGROUP, read_memory_limit

SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/dev/infiniband")


@dataclass(frozen=True)
class GpuFacts:
    """The GPU of a rank. free_bytes: of its memory, before the rank uses any."""

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class MachineFacts:
    """The machine of a rank, as this rank sees it.

    num_gpus: GPUs that the rank sees. gpu: the one that it would use; None = it has none.
    cores: numbers of the cores on which it may run. cpu_quota: cores that the container may use; None = all.
    free_memory_bytes: host memory that the rank's machine, container or job has left.
    shm_bytes, free_shm_bytes: of /dev/shm; None = there is none. open_files, locked_bytes: limits; None = unlimited.
    """

    num_gpus: int
    gpu: GpuFacts | None
    cores: tuple[int, ...]
    cpu_quota: float | None
    memory_bytes: int
    free_memory_bytes: int
    shm_bytes: int | None
    free_shm_bytes: int | None
    open_files: int | None
    locked_bytes: int | None
    has_infiniband: bool

    @classmethod
    def own(cls, local_rank: int) -> "MachineFacts":
        """Return the facts of this process. local_rank: its number on its node, which is also that of its GPU."""
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        memory_bytes, free_memory_bytes = _host_memory()
        shm_bytes, free_shm_bytes = _shared_memory()
        return cls(
            num_gpus=num_gpus,
            gpu=_gpu(local_rank) if local_rank < num_gpus else None,
            cores=tuple(sorted(os.sched_getaffinity(0))),
            cpu_quota=_cpu_quota(),
            memory_bytes=memory_bytes,
            free_memory_bytes=free_memory_bytes,
            shm_bytes=shm_bytes,
            free_shm_bytes=free_shm_bytes,
            open_files=_limit(resource.RLIMIT_NOFILE),
            locked_bytes=_limit(resource.RLIMIT_MEMLOCK),
            has_infiniband=INFINIBAND.is_dir(),
        )


def _gpu(index: int) -> GpuFacts:
    properties = torch.cuda.get_device_properties(index)
    try:
        free_bytes, _ = torch.cuda.mem_get_info(index)
    except RuntimeError:  # not even the memory that CUDA itself needs is free
        free_bytes = 0
    return GpuFacts(properties.name, str(getattr(properties, "uuid", "")), properties.total_memory, free_bytes)


def _limit(kind: int) -> int | None:
    """Return the limit up to which this process may raise its own; None = unlimited."""
    _, hard = resource.getrlimit(kind)
    return None if hard == resource.RLIM_INFINITY else hard


def _shared_memory() -> tuple[int | None, int | None]:
    """Return the size of /dev/shm and what is free of it, in bytes."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None, None
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def _host_memory() -> tuple[int, int]:
    """Return total and free host memory in bytes; those of the container or job if it may use less than the machine has."""
    machine = psutil.virtual_memory()
    limit = read_memory_limit()
    if limit is None:
        return machine.total, machine.available
    left_bytes = max(0, limit.limit_bytes - limit.used_bytes)
    return min(machine.total, limit.limit_bytes), min(machine.available, left_bytes)


def _cpu_quota() -> float | None:
    """Return the cores that the container may use; None = all."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no container, or the quota is "max"
        return None
