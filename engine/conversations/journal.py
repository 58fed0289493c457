"""Journal of finished conversations on disk, so that an interrupted run can be continued.

The first line holds the options that determine the result. Each further line holds one
conversation: {"line": its index among all lines of the inputs, "sample": {...}}. Lines are in the
order in which the conversations were finished; `write_to` writes them in the order of the inputs.
"""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.host.files import write_whole

FORMAT = "draftspeed regenerated conversations, version 1"


class JournalError(ValueError):
    """A journal that cannot be continued. The message names the file and says how to fix it."""


def as_line(value: Any) -> bytes:
    """Encode a value as a line of JSONL.

    Raises ValueError if JSON in UTF-8 cannot represent it, e.g. half of a surrogate pair or NaN.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


class Journal:
    """A file to which one process at a time appends finished conversations; a context manager."""

    def __init__(self, path: Path, decided_by: dict[str, Any]) -> None:
        """Start a journal, or continue an existing one; an incomplete last line is removed.

        decided_by: all options that the conversations depend on, with their values as JSON.
        Raises JournalError if another process writes it, if it has other options, or if it is no
        journal.
        """
        self.path = path
        self._offsets: dict[int, int] = {}
        self._end = 0
        self._file = path.open("a+b")
        try:
            self._lock()
            self._take_up(decided_by)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, line: int) -> bool:
        return line in self._offsets

    def add(self, line: int, sample: dict[str, Any]) -> None:
        """Append a finished conversation and flush it to the file."""
        assert line not in self._offsets, f"line {line} is finished already"
        self._offsets[line] = self._append(as_line({"line": line, "sample": sample}))

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield the conversations in the order of the inputs, read one at a time."""
        for _, offset in sorted(self._offsets.items()):
            self._file.seek(offset)
            yield json.loads(self._file.readline())["sample"]

    def write_to(self, output: Path) -> None:
        """Write the conversations to a JSONL file, which atomically replaces an existing one."""

        def write(place: Path) -> None:
            with place.open("wb") as file:
                file.writelines(as_line(sample) for sample in self.samples())

        write_whole(output, write)

    def delete(self) -> None:
        """Delete the file, once the output holds all conversations."""
        self.path.unlink()

    def _append(self, content: bytes) -> int:
        """Append bytes to the file and return the offset at which they start."""
        offset = self._end
        self._file.write(content)
        self._file.flush()
        self._end += len(content)
        return offset

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except BlockingIOError as error:
            raise JournalError(f"another process writes {self.path}; wait for it, or name another output") from error

    def _take_up(self, decided_by: dict[str, Any]) -> None:
        header = as_line({"format": FORMAT, "decided_by": decided_by})
        self._file.seek(0)
        found = self._file.readline()
        if found != header:
            if not header.startswith(found):  # a run killed at its start leaves a partial header
                raise JournalError(self._refusal(found, decided_by))
            self._file.truncate(0)
            self._append(header)
            return
        self._end = len(header)
        for number, record in enumerate(self._file, start=2):
            if not record.endswith(b"\n"):
                break
            self._offsets[self._line_of(record, number)] = self._end
            self._end += len(record)
        self._file.truncate(self._end)

    def _line_of(self, record: bytes, number: int) -> int:
        try:
            return json.loads(record)["line"]
        except (ValueError, TypeError, KeyError) as error:
            mend = "delete that line to have its conversation answered again"
            raise JournalError(f"{self.path}:{number} is not what was written there ({error}); {mend}") from error

    def _refusal(self, found: bytes, decided_by: dict[str, Any]) -> str:
        try:
            values = json.loads(found)
            theirs = values["decided_by"]
            ours = json.loads(as_line(decided_by))
            if values["format"] != FORMAT:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            return f"{self.path} is not a journal of unfinished conversations; delete it, or name another output"
        changes = [f"{key}: {theirs.get(key)!r}, now {value!r}" for key, value in ours.items() if theirs.get(key) != value]
        mend = f"Restore these, name another output, or delete {self.path} to start over"
        return f"{self.path} was started with other options; {'; '.join(changes)}. {mend}"
