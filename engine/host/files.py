"""Atomic writing of files with the permissions of the user's umask, and a check of file names.

A failed write raises one error that names the file and says how to fix the problem, whichever
library wrote it.
"""

import errno
import json
import math
import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands that write no tensors need not wait for torch
    import torch

PARTIAL = ".partial"  # suffix of a file that grows during a run and that a later run may continue
WRITING = ".writing"  # suffix of a file that `write_whole` is writing; no other file has it
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Parts of the messages of torch.save's write errors, which have no exception class of their own.
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error", "No space left")


class WriteError(OSError):
    """Error for a file or folder that cannot be written; str() names it and says what to do."""

    def __init__(self, path: Path, problem: str, number: int | None = None) -> None:
        super().__init__(number, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        if self.errno in DISK_FULL or "No space left" in self.problem:
            advice = "free some space on its disk, then run the same command again"
        else:
            advice = "check the folder, its permissions and its disk"
        return f"{self.path} cannot be written: {self.problem}; {advice}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert errors of a failed write to a WriteError that names `path`, a file or a folder."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        read_from = isinstance(error.filename, str) and not error.filename.startswith(str(path))
        if read_from:  # the data came from another file, and reading that file failed
            raise
        raise WriteError(path, error.strerror or str(error), error.errno) from error
    except RuntimeError as error:
        message = str(error)
        if not any(part in message for part in TORCH_WRITE_ERRORS):
            raise
        raise WriteError(path, message.splitlines()[0]) from error


def write_whole(path: Path, write: Callable[[Path], object], *, shared: bool = False) -> None:
    """Write a file atomically: `write` creates a temporary file, which then replaces `path`.

    The temporary file lies in the same folder. A failure leaves the old file unchanged. A path that
    is not a regular file, such as /dev/stdout, is written directly.
    shared: whether several processes may write the file at the same time.
    Raises WriteError.
    """
    path = Path(path)
    # This checks the name as given, because the resolved name of a pipe, such as /dev/stdout, is
    # not a path.
    if path.exists() and not path.is_file():
        with writing(path):
            write(path)
        return
    path = Path(os.path.realpath(path))  # a symbolic link stays a link
    with writing(path):
        suffix = f".{socket.gethostname()}-{os.getpid()}{WRITING}" if shared else WRITING
        partial = path.with_name(f"{path.name}{suffix}")
        try:
            with partial.open("wb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            write(partial)
            partial.chmod(mode)  # some libraries create files that only their owner can read
            sync(partial)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a UTF-8 file atomically with `write_whole`. Raises WriteError."""
    write_whole(path, lambda place: place.write_text(text, encoding="utf-8"), shared=shared)


def write_json(path: Path, value: Any, *, shared: bool = False, sort_keys: bool = False) -> None:
    """Write a value as indented JSON atomically with `write_whole`; non-finite numbers become null.

    Raises WriteError.
    """
    text = json.dumps(finite_or_null(value)[0], allow_nan=False, indent=2, sort_keys=sort_keys)
    write_text(path, text + "\n", shared=shared)


def finite_or_null(value: Any) -> tuple[Any, int]:
    """Replace non-finite numbers in plain containers by None; return the result and their count."""
    if isinstance(value, float):
        return (value, 0) if math.isfinite(value) else (None, 1)
    if isinstance(value, dict):
        parts = {key: finite_or_null(part) for key, part in value.items()}
        return {key: part for key, (part, _) in parts.items()}, sum(count for _, count in parts.values())
    if isinstance(value, list | tuple):
        replaced = [finite_or_null(part) for part in value]
        return [part for part, _ in replaced], sum(count for _, count in replaced)
    return value, 0


def write_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous host tensors as safetensors with `write_whole`. Raises WriteError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    known = None if metadata is None else dict(metadata)

    def write(place: Path) -> None:
        if not place.is_file():  # safetensors would replace a device by a file
            raise WriteError(path, "it is not a regular file")
        try:
            save_file(dict(tensors), place, metadata=known)
        except SafetensorError as error:
            raise WriteError(path, str(error)) from error

    write_whole(path, write)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_plain_name(name: Any) -> bool:
    """Return whether a value is a plain file name: a non-empty string, not hidden, without a path.

    Use it for names that are read from a file and must refer to the same folder.
    """
    if not isinstance(name, str) or not name or name.startswith("."):
        return False
    return not any(character in name for character in ("/", "\\", "\0"))
