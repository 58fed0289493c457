"""Convert sources to one training file and one held-out file of conversations.

Rows that are refused, duplicated or not taken are counted, and the first refused ones are named.
Every source is read once, into a working file next to the outputs. Only a hash of each conversation
and the offset of its line stay in memory. The outputs are then written in random order under
temporary names and renamed at the end, train.jsonl last.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from engine.config.sections import Config, PrepareSection
from engine.conversations.published_sets import Row, Rows, conversation_of, open_source
from engine.data.messages import BadSample, Message
from engine.host.files import PARTIAL, WriteError, sync

TRAIN = "train.jsonl"
HELD_OUT = "held_out.jsonl"
REPORT = "report.json"
NAMED_ROWS = 5
MAX_DETAIL = 240
ROWS_TO_JUDGE = 10_000
ROWS_BETWEEN_SIGNS = 100


class Bar(Protocol):
    """Shows progress; `telemetry.ProgressBar` is one."""

    def move_to(self, done: int, text: str) -> None: ...


Progress = Callable[[int, str], AbstractContextManager[Bar]]


@dataclass
class SourceCounts:
    """Counts of the rows of a source.

    rows: rows read. Each is either dropped, a duplicate or kept.
    duplicates: rows with the same conversation as an earlier row of any source.
    kept: conversations that can be used.
    train, held_out: kept conversations written to each file.
    turns, characters: totals over the kept conversations.
    dropped: rows that cannot be used, by reason.
    first_dropped: (place, reason, detail) of the first dropped rows.
    """

    name: str
    rows: int = 0
    duplicates: int = 0
    kept: int = 0
    train: int = 0
    held_out: int = 0
    turns: int = 0
    characters: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    def drop(self, place: str, error: BadSample) -> None:
        self.dropped[error.reason] += 1
        if len(self.first_dropped) < NAMED_ROWS:
            detail = error.detail.encode(errors="backslashreplace").decode()  # may quote invalid text
            self.first_dropped.append((place, error.reason, detail[:MAX_DETAIL]))

    def keep(self, messages: Sequence[Message]) -> None:
        self.kept += 1
        self.turns += len(messages)
        self.characters += sum(len(message["content"]) for message in messages)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, the number of conversations taken, and means per kept conversation."""
        kept = max(1, self.kept)
        means = {"mean_turns": round(self.turns / kept, 2), "mean_characters": round(self.characters / kept, 1)}
        return vars(self) | {"taken": self.train + self.held_out} | means

    def dropped_lines(self) -> list[str]:
        """Return lines with the reasons for refused rows, and the first such rows by name."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        first = [f"  {place}: {reason}: {detail}" for place, reason, detail in self.first_dropped]
        return [f"{self.name}: {self.num_dropped:,} unusable: {reasons}", *first] if first else []


@dataclass(frozen=True)
class PrepareReport:
    """Counts of all sources, the options of the selection, and the files written.

    files: number of conversations and bytes of each file, by name.
    """

    sources: Sequence[SourceCounts]
    files: dict[str, dict[str, int]]
    seed: int
    weights: tuple[float, ...] | None
    max_samples: int | None
    held_out_share: float

    def table(self) -> Table:
        """Return a table with one row per source, which fits 80 columns."""
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("source", overflow="fold")
        for heading in ("rows", "dropped", "doubled", "kept", "taken", "turns", "chars"):
            table.add_column(heading, justify="right", no_wrap=True)
        for source in self.sources:
            figures = source.to_dict()
            counts = (source.rows, source.num_dropped, source.duplicates, source.kept, figures["taken"])
            means = f"{figures['mean_turns']:.1f}", f"{figures['mean_characters']:,.0f}"
            table.add_row(Text(source.name), *(f"{count:,}" for count in counts), *means)
        return table

    def lines(self) -> list[str]:
        """Return lines on refused rows, the first ones by name, and on the files written."""
        dropped = [line for source in self.sources for line in source.dropped_lines()]
        files = [f"{name}: {of['conversations']:,} conversations, {of['bytes']:,} bytes" for name, of in self.files.items()]
        if self.held_out_share > 0 and HELD_OUT not in self.files:
            files.append(f"no {HELD_OUT}: too few conversations for prepare.held_out_share={self.held_out_share}")
        return dropped + files

    def to_json(self) -> str:
        content = vars(self) | {"sources": [source.to_dict() for source in self.sources]}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


@dataclass
class _Shelf:
    """A source's kept conversations, as lines of a working file.

    offsets: offset of each conversation's line in the file, uint64.
    questions: hash of each conversation's first question, uint64.
    """

    counts: SourceCounts
    path: Path
    offsets: array = field(default_factory=lambda: array("Q"))
    questions: array = field(default_factory=lambda: array("Q"))


@dataclass
class _Seen:
    """128-bit hashes of all conversations read so far, and of the ids assigned to them."""

    conversations: set[bytes] = field(default_factory=set)
    ids: set[bytes] = field(default_factory=set)


def prepare(config: Config, progress: Progress) -> PrepareReport:
    """Write train.jsonl, held_out.jsonl and report.json for the sources of `config.prepare`.

    The files are written to `prepare.output_dir`; after an error, none is left there.
    progress(total units, name): makes a progress bar; a total of 0 means unknown.
    Raises ValueError if a source cannot be read or has no usable row, if an output exists already,
    or if more rows are refused than `data.max_bad_share` allows. Raises OSError if the folder
    cannot be written to.
    """
    section = config.prepare
    folder = Path(config.prepare.output_dir)
    for path in (folder / TRAIN, folder / HELD_OUT, folder / REPORT):
        if path.exists():
            raise ValueError(f"{path} exists already; name another prepare.output_dir or delete it")
    sources = [open_source(name) for name in section.sources]
    folder.mkdir(parents=True, exist_ok=True)
    _remove_partials(folder)
    try:
        shelves = _gather(sources, folder, config.data.max_bad_share, progress)
        sides = _sides(shelves, _choose(shelves, section, config.seed), section.held_out_share)
        _write(folder, shelves, sides, progress)
        report = _report(folder, shelves, sides, config)
        _partial(folder / REPORT).write_text(report.to_json(), encoding="utf-8")
        _put_in_place([folder / name for name in (REPORT, *sides)])
        return report
    except OSError as error:
        if error.errno and not error.filename and not isinstance(error, WriteError):
            problem = error.strerror or str(error)
            # The error of a full disk names no file.
            raise WriteError(folder, problem, error.errno) from error
        raise
    finally:
        _remove_partials(folder)


def num_taken(available: Sequence[int], weights: Sequence[float] | None, max_samples: int | None) -> list[int]:
    """Return how many conversations to take from each source, at most `max_samples` in total.

    No conversation is taken twice. With weights, the numbers are proportional to them, and as large
    as the scarcest source allows. Without weights, everything is taken, or the same share of each
    source. The remainder from rounding down goes to the sources with the largest fractions.
    """
    parts = [Fraction(str(weight)) for weight in weights] if weights else [Fraction(count) for count in available]
    scale = min(count / part for count, part in zip(available, parts, strict=True) if part)
    if max_samples is not None:
        scale = min(scale, max_samples / sum(parts, Fraction(0)))
    exact = [part * scale for part in parts]
    taken = [int(number) for number in exact]
    by_fraction = sorted(range(len(exact)), key=lambda index: (taken[index] - exact[index], index))
    for index in by_fraction[: int(sum(exact)) - sum(taken)]:
        taken[index] += 1
    return taken


def question_hash(messages: Sequence[Message]) -> int:
    """Return a 64-bit hash of the user's first message, ignoring case and amount of whitespace."""
    question = next(message["content"] for message in messages if message["role"] == "user")
    return int.from_bytes(blake2b(" ".join(question.lower().split()).encode(), digest_size=8).digest(), "little")


def _gather(sources: Sequence[Rows], folder: Path, max_bad_share: float, progress: Progress) -> list[_Shelf]:
    """Read every source into its working file.

    Raises ValueError if a source has no usable row, or if too many rows are refused.
    """
    shelves = []
    seen = _Seen()
    for index, rows in enumerate(sources):
        shelf = _Shelf(SourceCounts(rows.name), folder / f"source_{index}.jsonl{PARTIAL}")
        shelves.append(shelf)
        _fill(shelf, rows, seen, max_bad_share, progress)
        if shelf.counts.rows == shelf.counts.num_dropped:
            raise ValueError("\n".join([f"{rows.name}: no row is usable", *shelf.counts.dropped_lines()]))
    every = [shelf.counts for shelf in shelves]
    share = sum(counts.num_dropped for counts in every) / sum(counts.rows for counts in every)
    if share > max_bad_share:
        mend = "fix or remove them, or raise data.max_bad_share to continue without them"
        problem = f"{share:.1%} of the rows are unusable, data.max_bad_share allows {max_bad_share:.1%}; {mend}"
        raise ValueError("\n".join([problem, *(line for counts in every for line in counts.dropped_lines())]))
    return shelves


def _fill(shelf: _Shelf, rows: Rows, seen: _Seen, max_bad_share: float, progress: Progress) -> None:
    counts = shelf.counts
    with shelf.path.open("wb") as file, progress(rows.total or 0, rows.name) as bar:
        for place, row in rows:
            counts.rows += 1
            try:
                line = _line_of(row, shelf, seen)
            except BadSample as error:
                counts.drop(place, error)
            else:
                if line:
                    shelf.offsets.append(file.tell())
                    file.write(line)
            if counts.rows == ROWS_TO_JUDGE == counts.num_dropped and max_bad_share < 1:
                mend = "leave the source out, or set data.max_bad_share=1 to continue reading"
                problem = f"{rows.name}: none of its first {ROWS_TO_JUDGE:,} rows is usable; {mend}"
                raise ValueError("\n".join([problem, *counts.dropped_lines()]))
            if counts.rows % ROWS_BETWEEN_SIGNS == 0 and rows.done != rows.total:
                bar.move_to(rows.done, f"{rows.name}: {counts.rows:,} rows, {counts.kept:,} kept")
        bar.move_to(rows.done, f"{rows.name}: {counts.rows:,} rows, {counts.kept:,} kept")


def _line_of(row: Row, shelf: _Shelf, seen: _Seen) -> bytes:
    """Convert a row to its output line and count it; return b"" if it is a duplicate.

    Raises BadSample if the row cannot be used.
    """
    conversation = conversation_of(row)
    messages = conversation["conversations"]
    digest = _digest([messages, conversation.get("tools")])
    if digest in seen.conversations:
        shelf.counts.duplicates += 1
        return b""
    name = f"{shelf.counts.name}:{conversation.pop('id', shelf.counts.rows)}"
    while _digest(name) in seen.ids:
        name += f"#{shelf.counts.rows}"
    line = _as_json({"id": name, **conversation, "source": shelf.counts.name}) + b"\n"
    seen.conversations.add(digest)
    seen.ids.add(_digest(name))
    shelf.counts.keep(messages)
    shelf.questions.append(question_hash(messages))
    return line


def _digest(value: Any) -> bytes:
    return blake2b(_as_json(value, sort_keys=True), digest_size=16).digest()


def _as_json(value: Any, sort_keys: bool = False) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=sort_keys).encode()
    except UnicodeEncodeError as error:
        raise BadSample("not UTF-8", "a text holds half of a surrogate pair, or bytes of another encoding") from error
    except TypeError as error:
        raise BadSample("not JSON", str(error)) from error


def _choose(shelves: Sequence[_Shelf], section: PrepareSection, seed: int) -> np.ndarray:
    """Choose conversations at random; return (shelf index, conversation index) pairs, int64 [n, 2].

    The pairs are in the order in which the conversations are written.
    Raises ValueError if a weighted source has no conversation left.
    """
    for shelf in shelves:
        if section.weights and not shelf.offsets:
            raise ValueError(f"{shelf.counts.name}: all of it is in earlier sources too; remove it and its weight")
    available = [len(shelf.offsets) for shelf in shelves]
    generator = np.random.default_rng(seed)
    drawn = []
    for index, taken in enumerate(num_taken(available, section.weights, section.max_samples)):
        conversations = generator.permutation(available[index])[:taken]
        drawn.append(np.stack([np.full_like(conversations, index), conversations], axis=1))
    return generator.permutation(np.concatenate(drawn))


def _sides(shelves: Sequence[_Shelf], chosen: np.ndarray, held_out_share: float) -> dict[str, np.ndarray]:
    """Split `chosen` into the rows of each file, by file name; a file without rows is omitted.

    Raises ValueError if no conversation is left for training.
    """
    limit = int(held_out_share * 2**64)
    held_out = np.zeros(len(chosen), dtype=bool)
    for index, shelf in enumerate(shelves):
        own = chosen[:, 0] == index
        held_out[own] = np.frombuffer(shelf.questions, dtype=np.uint64)[chosen[own, 1]] < limit
    if held_out.all():
        problem = f"all {len(chosen):,} conversations are held out"
        raise ValueError(f"{problem}; lower prepare.held_out_share={held_out_share} or give more sources")
    sides = {HELD_OUT: chosen[held_out], TRAIN: chosen[~held_out]}
    return {name: side for name, side in sides.items() if len(side)}


def _write(folder: Path, shelves: Sequence[_Shelf], sides: dict[str, np.ndarray], progress: Progress) -> None:
    """Write the conversations of each file, under a temporary name."""
    total = sum(map(len, sides.values()))
    written = 0
    with ExitStack() as stack, progress(total, "conversations written") as bar:
        working = [stack.enter_context(shelf.path.open("rb")) for shelf in shelves]
        for name, side in sides.items():
            file = stack.enter_context(_partial(folder / name).open("wb"))
            for index, conversation in zip(*side.T.tolist(), strict=True):
                working[index].seek(shelves[index].offsets[conversation])
                file.write(working[index].readline())
                written += 1
                if written % ROWS_BETWEEN_SIGNS == 0 or written == total:
                    bar.move_to(written, "conversations written")


def _report(folder: Path, shelves: Sequence[_Shelf], sides: dict[str, np.ndarray], config: Config) -> PrepareReport:
    section = config.prepare
    files = {}
    for name, side in sides.items():
        files[name] = {"conversations": len(side), "bytes": _partial(folder / name).stat().st_size}
        for index, taken in enumerate(np.bincount(side[:, 0], minlength=len(shelves)).tolist()):
            setattr(shelves[index].counts, "train" if name == TRAIN else "held_out", taken)
    sources = [shelf.counts for shelf in shelves]
    return PrepareReport(sources, files, config.seed, section.weights, section.max_samples, section.held_out_share)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _put_in_place(paths: Sequence[Path]) -> None:
    for path in paths:
        sync(_partial(path))
    for path in paths:
        os.replace(_partial(path), path)


def _remove_partials(folder: Path) -> None:
    """Delete temporary files of this run, or of an earlier run that was killed."""
    for pattern in ("source_*.jsonl", TRAIN, HELD_OUT, REPORT):
        for path in folder.glob(f"{pattern}{PARTIAL}"):
            path.unlink()
