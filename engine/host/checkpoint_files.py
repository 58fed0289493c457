"""The files of a checkpoint: copied to the host at once, written in the background, whole or not at all.

Each process writes its own files and then a record of them. Process 0 waits for the records of all
and then writes `complete.json`, without which a checkpoint does not count.
"""

import copy
import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from engine.host.files import WriteError, sync, write_json, writing

COMPLETE = "complete.json"  # {"files": {name: {"bytes": number, "sha256": text}}}
RECORD = "written_{}.json"  # of one process, until the checkpoint is complete
SECONDS_BETWEEN_LOOKS = 0.05
BLOCK = 1 << 22  # bytes read at once
READERS = 4  # files that are checked at the same time
SPARE_SHARE = 1.05  # a file is a little larger than its tensors


@dataclass(frozen=True)
class FileFacts:
    """Size and checksum of a written file."""

    num_bytes: int
    sha256: str


class HashingFile(io.RawIOBase):
    """A file to write to, which computes the checksum of what is written from start to end."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        view = memoryview(data)
        self._num_bytes += view.nbytes
        return self._file.write(data)

    def facts(self) -> FileFacts:
        """Return the facts about what was written."""
        return FileFacts(self._num_bytes, self._digest.hexdigest())


def on_host(value: Any) -> Any:
    """Return a copy of nested containers whose tensors are on the host; later changes of `value` do not affect it."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same class, with its attributes
        for key, part in value.items():
            copied[key] = on_host(part)
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(on_host(part) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(on_host(part) for part in value)
    return copy.deepcopy(value)


def num_bytes_of(value: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(num_bytes_of(part) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(num_bytes_of(part) for part in value)
    return 0


@dataclass(frozen=True)
class Outcome:
    """The result of writing a checkpoint.

    problem: why it was not written; None = it is complete. warning: what else could not be written.
    """

    folder: Path
    problem: str | None = None
    warning: str | None = None


class CheckpointFiles:
    """The checkpoint engine that DeepSpeed calls: `save` takes a copy, `write` writes what was saved."""

    name = "background"

    def __init__(self, rank: int, num_ranks: int, read: Callable[[Path, Any], Any]) -> None:
        """Create it.

        read: reads a file, with a device to map tensors to, and executes nothing in it.
        """
        self._read = read
        self._rank = rank
        self._num_ranks = num_ranks
        self._saved: dict[Path, Any] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._writing: Future[Outcome] | None = None

    # What DeepSpeed calls

    def create(self, info: Any) -> None:
        """Begin a checkpoint."""
        self._saved.clear()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a folder."""
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the contents of a file to the host."""
        self._saved[Path(path)] = on_host(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file."""
        return self._read(Path(path), map_location)

    def commit(self, info: Any) -> bool:
        """End a checkpoint; it is written by `write`."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        """Return whether tensors that share memory do so in the file; `on_host` separates them."""
        return False

    # What the run calls

    @property
    def num_bytes(self) -> int:
        """Bytes that `write` would write on this rank."""
        return int(SPARE_SHARE * sum(num_bytes_of(state) for state in self._saved.values()))

    def discard(self) -> None:
        """Forget what was saved."""
        self._saved.clear()

    def write(self, folder: Path, publish: Callable[[], None], timeout_s: float, add: Callable[[], None] | None = None) -> None:
        """Begin to write what was saved to the folder of a checkpoint.

        publish: called on rank 0 when the checkpoint is complete.
        timeout_s: how long rank 0 waits for the files of the other ranks.
        add: writes further files to the folder, on rank 0.
        """
        assert self._writing is None, "a checkpoint at a time"
        saved = self._saved
        self._saved = {}
        self._writing = self._thread.submit(self._write, saved, folder, publish, timeout_s, add)

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def finish(self) -> Outcome | None:
        """Wait until the checkpoint is written and return the outcome; None = there was none since the last call."""
        if self._writing is None:
            return None
        outcome = self._writing.result()
        self._writing = None
        return outcome

    def _write(
        self,
        saved: Mapping[Path, Any],
        folder: Path,
        publish: Callable[[], None],
        timeout_s: float,
        add: Callable[[], None] | None,
    ) -> Outcome:
        warning = None
        try:
            self._write_files(saved, folder)
            if self._rank == 0:
                warning = None if add is None else _problem_of_call(add)
                self._complete(folder, timeout_s)
        except (OSError, ValueError) as error:
            self._report(folder, str(error))
            return Outcome(folder, str(error))
        if self._rank == 0:
            problems = (warning, _problem_of_call(publish))
            warning = "; ".join(problem for problem in problems if problem is not None) or None
        return Outcome(folder, None, warning)

    def _write_files(self, saved: Mapping[Path, Any], folder: Path) -> None:
        facts = {}
        for path, state in saved.items():
            try:
                facts[path.name] = vars(write_state(path, state))
            except OSError:
                for written in saved:  # the record of the failure needs some space
                    written.unlink(missing_ok=True)
                raise
        write_json(folder / RECORD.format(self._rank), {"files": facts})

    def _complete(self, folder: Path, timeout_s: float) -> None:
        """Write `complete.json` when all ranks have written their files. Raises OSError if one could not."""
        files: dict[str, Any] = {}
        for record in self._records(folder, timeout_s):
            if "problem" in record:
                raise OSError(record["problem"])
            files |= record["files"]
        for path in folder.rglob("*"):
            name = str(path.relative_to(folder))
            if name not in files and path.is_file() and not name.startswith("written_"):
                files[name] = vars(facts_of(path))
        write_json(folder / COMPLETE, {"files": files})
        for rank in range(self._num_ranks):
            (folder / RECORD.format(rank)).unlink(missing_ok=True)

    def _records(self, folder: Path, timeout_s: float) -> Iterator[dict[str, Any]]:
        deadline_s = time.monotonic() + timeout_s
        for rank in range(self._num_ranks):
            path = folder / RECORD.format(rank)
            while not path.exists():
                if time.monotonic() > deadline_s:
                    raise WriteError(folder, f"rank {rank} did not write its files within {timeout_s:.0f} s")
                time.sleep(SECONDS_BETWEEN_LOOKS)
            yield json.loads(path.read_text(encoding="utf-8"))

    def _report(self, folder: Path, problem: str) -> None:
        """Tell rank 0 that this rank could not write; rank 0 removes what was written."""
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            return
        with suppress(OSError):
            write_json(folder / RECORD.format(self._rank), {"problem": f"rank {self._rank}: {problem}"})


def _problem_of_call(function: Callable[[], None]) -> str | None:
    """Call a function that writes files and return why it failed, or None."""
    try:
        function()
    except Exception as error:  # a plugin may raise anything, and the checkpoint is more important
        return str(error) or type(error).__name__
    return None


def write_state(path: Path, state: Any) -> FileFacts:
    """Write a file with `torch.save`, wait until it is on the disk, and return its facts. Raises WriteError."""
    with writing(path), path.open("wb") as file:
        hashing = HashingFile(file)
        torch.save(state, cast(IO[bytes], hashing))
    with writing(path):
        sync(path)
    return hashing.facts()


def facts_of(path: Path) -> FileFacts:
    """Return the facts of a file, which is read for it."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            num_bytes += len(block)
    return FileFacts(num_bytes, digest.hexdigest())


def problem_of(folder: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, or None if they are those that were written.

    All files are read.
    """
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        expected = {str(name): FileFacts(**facts) for name, facts in files.items()}
    except FileNotFoundError:
        return f"it is not complete: it has no {COMPLETE}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{COMPLETE} is damaged ({error})"
    with ThreadPoolExecutor(READERS) as pool:
        problems = pool.map(lambda name: _problem_of_file(folder, name, expected[name]), expected)
    return next((problem for problem in problems if problem is not None), None)


def _problem_of_file(folder: Path, name: str, expected: FileFacts) -> str | None:
    path = folder / name
    try:
        num_bytes = path.stat().st_size
        if num_bytes != expected.num_bytes:
            return f"{name} has {num_bytes} bytes instead of {expected.num_bytes}"
        return None if facts_of(path) == expected else f"the contents of {name} have changed"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
