"""Output folders of a job on several nodes: detect shared ones, copy files to the others."""

import time
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import distributed

from engine.host.files import PARTIAL, writing
from engine.parallel.mesh import World

SECONDS_TO_APPEAR = 5.0  # network file systems show a new file to other nodes with a delay
CHUNK_BYTES = 256 << 20


def is_shared(folder: Path, world: World) -> bool:
    """Return whether every node sees the folder that rank 0 sees; a collective.

    Rank 0 creates a file with a random name, and the first rank of every node looks for it.
    """
    if world.num_nodes == 1:
        return True
    token = folder / world.decide(lambda: f".shared-{uuid.uuid4().hex}")
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    world.barrier()
    is_missing = world.local_rank == 0 and not _appears(token)
    is_seen = not world.any_rank([is_missing])[0]
    if world.is_main:
        token.unlink()
    return is_seen


def copy_from_main(folder: Path, names: Iterable[str], world: World) -> None:
    """Copy files of rank 0's folder to the same folder on nodes that do not share it; a collective.

    Rank 0 broadcasts the bytes, and the first rank of each node writes them.
    """
    writes = world.writes_output and not world.is_main
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        _copy_file(folder / name, writes, world)
    world.barrier()


def _copy_file(path: Path, writes: bool, world: World) -> None:
    num_bytes = world.decide(lambda: path.stat().st_size)
    # Written outside of the folder, which must only hold files of a draft, even after a crash.
    partial = path.parent.with_name(f".{path.parent.name}.{path.name}{PARTIAL}")
    with ExitStack() as opened:
        source = opened.enter_context(path.open("rb")) if world.is_main else None
        copy = None
        if writes:
            opened.enter_context(writing(path))
            copy = opened.enter_context(partial.open("wb"))
        for start in range(0, num_bytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, num_bytes - start)
            chunk = torch.empty(size, dtype=torch.uint8)
            if source is not None:
                source.readinto(chunk.numpy().data)
            chunk = chunk.to(world.device)
            distributed.broadcast(chunk, src=0)
            if copy is not None:
                copy.write(chunk.cpu().numpy().data)
    if writes:
        partial.replace(path)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
