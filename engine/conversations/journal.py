"""The conversations finished so far, on the disk one by one: whatever ends a run, the next one goes on behind the last.

The first line says what decides the result, each further one holds a conversation: {"line": its index among all lines of the
inputs, "sample": {...}}. They come in the order in which they were finished; `write_to` puts them into that of the inputs.
"""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.host.files import write_whole

FORMAT = "draftspeed regenerated conversations, version 1"


class JournalError(ValueError):
    """A journal that cannot be continued; the message names the file and the mend."""


def as_line(value: Any) -> bytes:
    """A value as a line of JSONL. Raises ValueError for what UTF-8 or JSON cannot say: half a surrogate pair, NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


class Journal:
    """A file that one process at a time appends finished conversations to; a context manager."""

    def __init__(self, path: Path, decided_by: dict[str, Any]) -> None:
        """Begin a journal, or take one up; a last line that was cut off is removed.

        decided_by: option -> value as JSON, of all that the conversations depend on.
        Raises JournalError if another process writes it, or it is of other options or no journal at all.
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
        """Append a finished conversation; it outlives this process from here on."""
        assert line not in self._offsets, f"line {line} is finished already"
        self._offsets[line] = self._append(as_line({"line": line, "sample": sample}))

    def samples(self) -> Iterator[dict[str, Any]]:
        """The conversations in the order of the inputs, read one by one."""
        for _, offset in sorted(self._offsets.items()):
            self._file.seek(offset)
            yield json.loads(self._file.readline())["sample"]

    def write_to(self, output: Path) -> None:
        """Write the conversations to a JSONL file that appears, or takes the place of an earlier one, whole."""

        def write(place: Path) -> None:
            with place.open("wb") as file:
                file.writelines(as_line(sample) for sample in self.samples())

        write_whole(output, write)

    def delete(self) -> None:
        """Remove the file: the output holds all that it held."""
        self.path.unlink()

    def _append(self, content: bytes) -> int:
        """Where the content begins."""
        offset = self._end
        self._file.write(content)
        self._file.flush()
        self._end += len(content)
        return offset

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however the process ends
        except BlockingIOError as error:
            raise JournalError(f"another process writes {self.path}; wait for it, or name another output") from error

    def _take_up(self, decided_by: dict[str, Any]) -> None:
        header = as_line({"format": FORMAT, "decided_by": decided_by})
        self._file.seek(0)
        found = self._file.readline()
        if found != header:
            if not header.startswith(found):  # a beginning of it is all that a run killed at its start leaves
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
            mend = "delete that line, and its conversation is answered again"
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
        mend = f"Restore these, name another output, or delete {self.path} to begin anew"
        return f"{self.path} was begun with other options; {'; '.join(changes)}. {mend}"
