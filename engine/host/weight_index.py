"""Names of the files of a checkpoint's weights, and the index of one whose tensors are in several files."""

import json
from pathlib import Path, PurePosixPath

SINGLE = "model.safetensors"
PICKLED = "pytorch_model.bin"
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
SHOWN = 20
FETCH_AGAIN = "fetch this file again, for example with `hf download`, and compare its size with the published one"


def read_index(path: Path) -> dict[str, str]:
    """Return the file name of each tensor.

    Raises ValueError if the index is incomplete, or contains a file outside of its folder.
    """
    content = path.read_bytes()
    refuse_pointer(path, content)
    try:
        index = json.loads(content)["weight_map"]
        names = sorted(set(index.values()))
        leaving = [name for name in names if _leaves_folder(name)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{path} is cut off or not an index of weights ({type(error).__name__}: {error})"
        raise ValueError(f"{problem}; {FETCH_AGAIN}") from error
    if leaving:
        problem = f"{path} names files outside of its folder: {', '.join(leaving[:SHOWN])}"
        raise ValueError(f"{problem}; take the checkpoint from a source that you trust")
    return index


def _leaves_folder(name: str) -> bool:
    parts = PurePosixPath(name)
    return parts.is_absolute() or ".." in parts.parts


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raise ValueError if a file is a git-lfs pointer. start: its first bytes."""
    if start.startswith(LFS_POINTER):
        problem = f"{path} is a git-lfs pointer, not the file itself"
        raise ValueError(f"{problem}; run `git lfs pull` in its folder, or fetch it with `hf download`")
