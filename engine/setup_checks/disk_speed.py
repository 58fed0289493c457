"""Speed and free space of the disk that a run writes to."""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from engine.host.files import DISK_FULL
from engine.host.units import GIB, size_text
from engine.setup_checks.finding import Finding, ok, problem, warning

BLOCK_BYTES = 4 << 20
BLOCKS_PER_SYNC = 8
MOST_BYTES = 256 << 20
MOST_SECONDS = 4.0  # of writing, and of reading
LEAST_MB_PER_S = 50.0
LEAST_FREE_BYTES = 1 * GIB
WANTED_FREE_BYTES = 20 * GIB
CHECKPOINT_BYTES = 5_900_000_000  # weights in bf16 and Adam's fp32 state, 14 bytes each, of the draft of an 8B target


@dataclass(frozen=True)
class DiskFacts:
    """The disk of a folder, as one node sees it.

    host: the node. free_bytes: None = not known. write_mb_per_s, read_mb_per_s: in 1e6 bytes per second, including the
    time until the data is on the disk; None = not measured. error: why it cannot be written, or "". is_full: whether
    that is because the disk, or a quota, is full.
    """

    host: str
    free_bytes: int | None = None
    write_mb_per_s: float | None = None
    read_mb_per_s: float | None = None
    error: str = ""
    is_full: bool = False


@contextmanager
def existing(folder: Path) -> Iterator[None]:
    """Context manager in which a folder exists, if it can be created; what was created is removed at its end."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it has files now, or another rank has removed it
                path.rmdir()


def measure_disk(folder: Path, host: str, most_bytes: int = MOST_BYTES) -> DiskFacts:
    """Write and read a file in a folder, and return the facts.

    The file never has a name, so it is gone as soon as this process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            write_mb_per_s, num_bytes = _write(file.fileno(), most_bytes)
            read_mb_per_s = _read(file.fileno(), num_bytes)
    except OSError as error:
        return DiskFacts(host, error=error.strerror or str(error), is_full=error.errno in DISK_FULL)
    return DiskFacts(host, free_bytes, write_mb_per_s, read_mb_per_s)


def _write(file: int, most_bytes: int) -> tuple[float, int]:
    """Write blocks and wait until they are on the disk; returns MB/s and the bytes written."""
    block = os.urandom(BLOCK_BYTES)  # which no file system can compress
    num_bytes = 0
    began_s = time.perf_counter()
    while num_bytes < most_bytes and time.perf_counter() - began_s < MOST_SECONDS:
        for _ in range(BLOCKS_PER_SYNC):
            written = os.write(file, block)
            num_bytes += written
            if written < len(block):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    return num_bytes / (time.perf_counter() - began_s) / 1e6, num_bytes


def _read(file: int, num_bytes: int) -> float:
    """Read a file from the disk and not from memory, where the system allows it; returns MB/s."""
    with suppress(OSError):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(file, 0, os.SEEK_SET)
    done = 0
    began_s = time.perf_counter()
    while done < num_bytes and time.perf_counter() - began_s < MOST_SECONDS:
        done += len(os.read(file, BLOCK_BYTES))
    return done / max(time.perf_counter() - began_s, 1e-6) / 1e6


def judge_disk(nodes: Sequence[DiskFacts], folder: Path, is_shared: bool | None) -> list[Finding]:
    """Return the findings on the disk of a folder.

    nodes: facts of each node. is_shared: whether all nodes see the same folder; None = there is one node, or it is not known.
    """
    failed = [node for node in nodes if node.error]
    if failed:
        hosts = ", ".join(node.host for node in failed)
        text = f"{folder} cannot be written on {hosts}: {failed[0].error}"
        if failed[0].is_full:
            return [problem("disk", text, "Free some space, raise the quota, or name another folder (--folder)")]
        return [problem("disk", text, "Check the folder, its permissions and its disk, or name another one (--folder)")]
    findings = [_judge_space(nodes, folder), _judge_speed(nodes)]
    if is_shared is not None:
        findings.append(_judge_sharing(folder, is_shared))
    return findings


def _judge_space(nodes: Sequence[DiskFacts], folder: Path) -> Finding:
    least = min(nodes, key=lambda node: node.free_bytes or 0)
    free_bytes = least.free_bytes or 0
    text = f"{size_text(free_bytes)} free in {folder} on {least.host}"
    needed = f"a checkpoint of a draft for an 8B target takes about {size_text(CHECKPOINT_BYTES)}, and two are kept"
    fix = "Free some space, or name a folder on a larger disk (--folder here, output_dir in a run)"
    if free_bytes < LEAST_FREE_BYTES:
        return problem("disk space", f"{text}; {needed}", fix)
    if free_bytes < WANTED_FREE_BYTES:
        return warning("disk space", f"{text}; {needed}", fix)
    return ok("disk space", text)


def _judge_speed(nodes: Sequence[DiskFacts]) -> Finding:
    slowest = min(nodes, key=lambda node: node.write_mb_per_s or 0.0)
    write_mb_per_s = slowest.write_mb_per_s or 0.0
    read_mb_per_s = slowest.read_mb_per_s or 0.0
    text = f"writes {write_mb_per_s:,.0f} MB/s, reads {read_mb_per_s:,.0f} MB/s on {slowest.host}"
    if write_mb_per_s >= LEAST_MB_PER_S:
        return ok("disk speed", text)
    seconds = CHECKPOINT_BYTES / 1e6 / max(write_mb_per_s, 1e-3)
    text = f"{text}; a checkpoint of a draft for an 8B target takes {seconds:,.0f} s, while training goes on"
    return warning(
        "disk speed", text, "Name a folder on a faster disk, or make checkpoints less often (checkpoint.every_steps)"
    )


def _judge_sharing(folder: Path, is_shared: bool) -> Finding:
    if is_shared:
        return ok("shared folder", f"all nodes see the same {folder}")
    text = f"{folder} is not one folder on all nodes, so there would be no checkpoints and no stores"
    return warning("shared folder", text, "Set output_dir to a folder on a file system that the nodes share")
