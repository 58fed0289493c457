"""Find the files of a target's weights, and check that they are complete before reading them."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from engine.host.weight_index import FETCH_AGAIN, INDEX, LFS_POINTER, PICKLED, SHOWN, SINGLE, read_index, refuse_pointer

PICKLED_INDEX = "pytorch_model.bin.index.json"
LENGTH_BYTES = 8  # a safetensors file starts with the length of its header, in this many bytes
METADATA = "__metadata__"


@dataclass(frozen=True)
class WeightFiles:
    """Files of one checkpoint.

    paths: files by name.
    is_safetensors: whether the files are safetensors; otherwise they are PyTorch's pickled files
    (`.bin`).
    index: name of the file that holds each tensor; None for a checkpoint in one file.
    """

    paths: Mapping[str, Path]
    is_safetensors: bool
    index: Mapping[str, str] | None = None

    def check(self) -> None:
        """Raise ValueError if a file is cut off or a git-lfs pointer.

        Reads only the headers. The message names the file and a fix.
        """
        for path in self.paths.values():
            if self.is_safetensors:
                read_header(path)
            else:
                check_pickled(path)


def find_published(path: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a folder or hub repository, or None if there is no such file."""
    found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def find_weight_files(path: str, revision: str | None = None) -> WeightFiles:
    """Find the files of a checkpoint, with the same preferences as Transformers.

    Raises ValueError if there are none, if the index cannot be read, or if files in the index are
    missing.
    """
    for single, index, is_safetensors in ((SINGLE, INDEX, True), (PICKLED, PICKLED_INDEX, False)):
        found = find_published(path, single, revision)
        if found is not None:
            return WeightFiles({single: found}, is_safetensors)
        found = find_published(path, index, revision)
        if found is not None:
            return _named_by_index(path, found, revision, is_safetensors)
    names = ", ".join((SINGLE, INDEX, PICKLED, PICKLED_INDEX))
    problem = f"the folder or repository holds no weights: expected one of {names}"
    raise ValueError(f"target.path={path}: {problem}; fetch them, or name another target")


def _named_by_index(path: str, index_path: Path, revision: str | None, is_safetensors: bool) -> WeightFiles:
    index = read_index(index_path)
    names = sorted(set(index.values()))

    def find(name: str) -> Path | None:
        # Files of one revision are in one folder, so the hub is only needed for absent files.
        neighbour = index_path.parent / name
        return neighbour if neighbour.is_file() else find_published(path, name, revision)

    found = {name: find(name) for name in names}
    paths = {name: file for name, file in found.items() if file is not None}
    missing = [name for name in names if name not in paths]
    if missing:
        listed = ", ".join(missing[:SHOWN])
        problem = f"{len(missing)} of the {len(names)} files of {index_path.name} are missing: {listed}"
        raise ValueError(f"target.path={path}: {problem}; fetch them, for example with `hf download`")
    return WeightFiles(paths, is_safetensors, index)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read `dtype`, `shape` and `data_offsets` of each tensor from the header of a safetensors file.

    Raises ValueError if the file is cut off, a git-lfs pointer, or no safetensors file.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
        refuse_pointer(path, start)
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        if num_bytes < LENGTH_BYTES or length > num_bytes - LENGTH_BYTES:
            raise ValueError(f"{path} is cut off within its header: it has {num_bytes:,} bytes; {FETCH_AGAIN}")
        file.seek(LENGTH_BYTES)
        content = file.read(length)
    try:
        header = json.loads(content)
        header.pop(METADATA, None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        problem = f"{path} is not a safetensors file: its header cannot be read"
        raise ValueError(f"{problem} ({type(error).__name__}: {error}); {FETCH_AGAIN}") from error
    expected = LENGTH_BYTES + length + end
    if num_bytes != expected:
        problem = f"{path} is not whole: expected {expected:,} bytes, found {num_bytes:,}"
        raise ValueError(f"{problem}; {FETCH_AGAIN}")
    return header


def check_pickled(path: Path) -> None:
    """Raise ValueError if a PyTorch file is empty, a git-lfs pointer or an incomplete archive."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    refuse_pointer(path, start)
    is_archive = start.startswith(b"PK")
    if not start or (is_archive and not zipfile.is_zipfile(path)):
        raise ValueError(f"{path} is cut off: it has {path.stat().st_size:,} bytes; {FETCH_AGAIN}")
