"""The identity of a target: a short text that changes when its weights or its config do, cheap at a terabyte.

Of every file of weights the header (names, types and shapes of all tensors), the size and evenly spaced samples are hashed:
256 samples of 16 KiB, 4 MiB per file, or the whole file where it is not larger. Tensors of at least a 256th of their file are
always sampled, and a training step, which changes values all over a file, is always seen. An edit that lies wholly between
two samples and keeps every name, type and shape is missed. The same weights in other files count as another target.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import xxhash
from transformers.utils import CONFIG_NAME

from engine.config.sections import TargetSection
from engine.data.fingerprint import hash_of
from engine.parallel.mesh import World
from engine.target.configuration import MODELOPT_CONFIG
from engine.target.loading import refuse_misfits
from engine.weights.weight_files import LENGTH_BYTES, find_published, find_weight_files

SAMPLE_BYTES = 1 << 14
SAMPLES_PER_FILE = 256
THREADS = 8  # files that are read at the same time
# Keys of a config.json that say who wrote it, and not what the model computes.
NO_PART_OF_IDENTITY = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def target_identity(section: TargetSection) -> str:
    """Return the hash of a target's config and that of its weights, joined by a hyphen.

    Files of a hub repository are taken from the local cache, and fetched where they are not there. Raises ValueError, naming
    the file, for one that is missing, cut off or a git-lfs pointer.
    """
    files = find_weight_files(section.path, section.revision)
    files.check()
    paths = [files.paths[name] for name in sorted(files.paths)]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda path: _digest(path, files.is_safetensors), paths))
    return f"{_hash_of_config(section)}-{hash_of(digests)}"


def shared_identity(section: TargetSection, world: World) -> str:
    """Return `target_identity` on every rank; a collective, in which the first rank of each node reads the files.

    Raises ValueError on every rank if a node's files are not whole or do not fit the config beside them, or if nodes hold
    different targets under the same path.
    """
    own: tuple[str | None, str | None] = (None, None)
    # Every rank waits here while one downloads, on the hub's file locks, which have no time limit; a collective has one.
    # What it raises is raised below, on every rank, by the first rank of the node.
    with suppress(ValueError, OSError):
        find_weight_files(section.path, section.revision)
    if world.local_rank == 0:
        try:
            own = (target_identity(section), None)
            refuse_misfits(section)
        except (ValueError, OSError) as error:
            own = (None, str(error))
    everyone = world.gather(own)
    for rank, (_, problem) in enumerate(everyone):
        if problem is not None:
            where = f"rank {rank}: " if world.size > 1 else ""
            raise ValueError(f"{where}{problem}")
    found = {rank: identity for rank, (identity, _) in enumerate(everyone) if identity is not None}
    first = min(found)
    for rank, identity in found.items():
        if identity != found[first]:
            what = what_changed(found[first], identity)
            problem = f"target.path={section.path}: {what} on the node of rank {rank}"
            raise ValueError(f"{problem} than on that of rank {first}; copy the same target to every node")
    return found[first]


def what_changed(before: str | None, now: str | None) -> str | None:
    """Return what differs between two identities, as a phrase; None if they agree or one of them is not known."""
    if before is None or now is None or before == now:
        return None
    config_before, _, weights_before = before.partition("-")
    config_now, _, weights_now = now.partition("-")
    if weights_before == weights_now:
        return "the target's config.json is another one"
    if config_before == config_now:
        return "the target's weights are other ones"
    return "the target's weights and config.json are other ones"


def sampled_ranges(start: int, end: int) -> list[tuple[int, int]]:
    """Return the parts of a file that are read, as first byte and end, of all that lies between `start` and `end`."""
    if end - start <= SAMPLES_PER_FILE * SAMPLE_BYTES:
        return [(start, end)]
    last = end - SAMPLE_BYTES
    firsts = (start + (last - start) * number // (SAMPLES_PER_FILE - 1) for number in range(SAMPLES_PER_FILE))
    return [(first, first + SAMPLE_BYTES) for first in firsts]


def _digest(path: Path, is_safetensors: bool) -> str:
    """Hash of a file's size, its header and its samples."""
    num_bytes = path.stat().st_size
    digest = xxhash.xxh3_128(str(num_bytes).encode())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data_start = 0
        if is_safetensors:
            header_bytes = int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "little")
            data_start = LENGTH_BYTES + header_bytes
            digest.update(os.pread(descriptor, data_start, 0))
        ranges = sampled_ranges(data_start, num_bytes)
        if len(ranges) > 1:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # else the kernel reads ahead of each sample
        for first, end in ranges:
            digest.update(os.pread(descriptor, end - first, first))
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _hash_of_config(section: TargetSection) -> str:
    content: dict[str, object] = {}
    for name in (CONFIG_NAME, MODELOPT_CONFIG):
        path = find_published(section.path, name, section.revision)
        if path is not None:
            content[name] = _parsed(path)
    return hash_of(content)


def _parsed(path: Path) -> object:
    """The values of a published config without those that say who wrote it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key not in NO_PART_OF_IDENTITY}
