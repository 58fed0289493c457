"""The identity of a target: a short text that changes when its weights or its config change.

It is cheap to compute even for a terabyte of weights. For every weight file, the header (names,
types and shapes of all tensors), the size and evenly spaced samples are hashed: 256 samples of
16 KiB, so 4 MiB per file, or the whole file if it is not larger. Tensors of at least 1/256 of their
file are always sampled. A training step is always detected, since it changes values all over a
file. An edit that lies entirely between two samples and keeps every name, type and shape is missed.
The same weights stored in other files count as another target.
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
# Keys of a config.json that describe who wrote it, not what the model computes.
NO_PART_OF_IDENTITY = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def target_identity(section: TargetSection) -> str:
    """Return the hash of a target's config and that of its weights, joined by a hyphen.

    Files of a hub repository are taken from the local cache, or downloaded if they are not there.
    Raises ValueError, naming the file, if a file is missing, cut off or a git-lfs pointer.
    """
    files = find_weight_files(section.path, section.revision)
    files.check()
    paths = [files.paths[name] for name in sorted(files.paths)]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda path: _digest(path, files.is_safetensors), paths))
    return f"{_hash_of_config(section)}-{hash_of(digests)}"


def shared_identity(section: TargetSection, world: World) -> str:
    """Return `target_identity` on every rank; the first rank of each node reads the files.

    This is a collective of all ranks. Raises ValueError on every rank if a node's files are
    incomplete or do not fit the config next to them, or if nodes hold different targets under the
    same path.
    """
    own: tuple[str | None, str | None] = (None, None)
    # While one rank downloads, the others wait here on the hub's file locks, which have no timeout,
    # unlike a collective. Errors are suppressed here: the first rank of the node meets them again
    # below, and they are raised on every rank.
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
            raise ValueError(f"{problem} compared with that of rank {first}; copy the same target to every node")
    return found[first]


def what_changed(before: str | None, now: str | None) -> str | None:
    """Return a phrase that says what differs between two identities.

    Returns None if they agree or if one of them is unknown.
    """
    if before is None or now is None or before == now:
        return None
    config_before, _, weights_before = before.partition("-")
    config_now, _, weights_now = now.partition("-")
    if weights_before == weights_now:
        return "the target's config.json differs"
    if config_before == config_now:
        return "the target's weights differ"
    return "the target's weights and config.json differ"


def sampled_ranges(start: int, end: int) -> list[tuple[int, int]]:
    """Return the ranges (first, end) that are hashed of a file's bytes from `start` to `end`."""
    if end - start <= SAMPLES_PER_FILE * SAMPLE_BYTES:
        return [(start, end)]
    last = end - SAMPLE_BYTES
    firsts = (start + (last - start) * number // (SAMPLES_PER_FILE - 1) for number in range(SAMPLES_PER_FILE))
    return [(first, first + SAMPLE_BYTES) for first in firsts]


def _digest(path: Path, is_safetensors: bool) -> str:
    """Return the hash of a file's size, its header and its samples."""
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
            # Otherwise the kernel reads ahead after each sample.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
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
    """Return the values of a published config without those that describe who wrote it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key not in NO_PART_OF_IDENTITY}
