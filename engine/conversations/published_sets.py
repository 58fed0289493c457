"""Read published data sets and conversation files, and convert their rows to conversations.

The format of a row is recognised by its columns, independently of its source: turns, or a question
and its answer. A row that cannot be converted without loss is refused with a reason. Files are read
in chunks. Data sets of the Hugging Face hub are streamed with the package datasets, which is needed
for nothing else.
"""

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.config.strict import nearest
from engine.data.messages import MEDIA_KEYS, BadSample, Message, parse, parse_text, read_messages

TURN_COLUMNS = ("conversations", "messages", "conversation", "data")
QUESTION_COLUMNS = ("instruction", "question", "prompt", "query", "problem", "input")
# An `answer` next to other answer columns is only the bare result, so it comes last.
ANSWER_COLUMNS = ("response", "output", "completion", "solution", "answer")
SYSTEM_COLUMNS = ("system", "system_prompt")
ID_COLUMNS = ("id", "uuid", "prompt_id", "conversation_id")
# Keys that templates read.
TURN_KEYS = ("role", "content", "name", "reasoning_content", "thinking", "tool_call_id", "tool_calls")
ASSISTANTS = {"chatgpt", "bing", "bard", "model"}
CALCULATOR_NOTE = re.compile(r"<<[^<>\n]*>>")
GSM8K_RESULT = re.compile(r"\n#### .*\Z")
HUB_NAME = re.compile(r"(?!\.)([\w.-]+/[\w.-]+)(?::([^:]*)(?::([^:]+))?)?")
FILE_TYPES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
BETWEEN_ITEMS = re.compile(r"[\s,]*")
CHUNK_CHARACTERS = 1 << 20
ROWS_AT_ONCE = 200

Row = Any  # the bytes of a JSONL line, or a mapping of columns
Placed = tuple[str, Row, int]  # place of the row, the row, and the units of its part read so far


@dataclass(frozen=True)
class Source:
    """A published data set that prepare_data.py knows by name.

    hub_id, config, split: its location on the Hugging Face hub; an empty config is the default one.
    about: description in one line.
    """

    name: str
    hub_id: str
    config: str
    split: str
    about: str


_NAMED = (
    Source("ultrachat", "HuggingFaceH4/ultrachat_200k", "", "train_sft", "multi-turn chat, written by ChatGPT"),
    Source("sharegpt", "Aeala/ShareGPT_Vicuna_unfiltered", "", "train", "conversations with ChatGPT, shared by users"),
    Source("perfectblend", "mlabonne/open-perfectblend", "", "train", "a mixture of chat, mathematics, code and instructions"),
    Source(
        "magpie",
        "Magpie-Align/Magpie-Llama-3.1-Pro-300K-Filtered",
        "",
        "train",
        "questions and answers by Llama-3.1-70B",
    ),
    Source("opencodeinstruct", "nvidia/OpenCodeInstruct", "", "train", "programming tasks and their solutions in Python"),
    Source("gsm8k", "openai/gsm8k", "main", "train", "grade-school word problems, solved step by step"),
)
SOURCES = {source.name: source for source in _NAMED}


@dataclass(frozen=True)
class _Part:
    """A file or a data set of the hub.

    read: yields its rows.
    size: in units of `unit`; None if unknown.
    """

    read: Callable[[], Iterator[Placed]]
    size: int | None
    unit: str


@dataclass
class Rows:
    """Iterable over the rows of a source, as (place, row); `place` names the row in reports.

    done: units read so far, out of `total`: bytes of JSONL and JSON files, otherwise rows.
    """

    name: str
    parts: Sequence[_Part]
    done: int = 0

    @property
    def total(self) -> int | None:
        """Total number of units; None if a size is unknown or the files have different units."""
        units = {part.unit for part in self.parts}
        known_sizes = [part.size for part in self.parts if part.size is not None]
        if len(units) > 1 or len(known_sizes) < len(self.parts):
            return None
        return sum(known_sizes)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for part in self.parts:
            before = self.done
            for place, row, done in part.read():
                self.done = before + done
                yield place, row
            self.done = self.done if part.size is None else before + part.size


def open_source(name: str) -> Rows:
    """Open a source by name.

    name: a known data set, a file, a folder or glob of files, or a data set of the hub.
    Raises ValueError if there is no such source, if a file is empty, or if the hub cannot be
    reached. Iterating raises ValueError if a file that is not JSONL is damaged. A damaged line of
    JSONL is yielded as any other row, and `conversation_of` refuses it.
    """
    if name in SOURCES:
        source = SOURCES[name]
        return Rows(name, [_hub_part(name, source.hub_id, source.config, source.split)])
    if files := _files(name):
        return Rows(name, [_file_part(path) for path in files])
    if not name.endswith(FILE_TYPES) and (match := HUB_NAME.fullmatch(name)):
        hub_id, config, split = match.groups()
        return Rows(name, [_hub_part(name, hub_id, config or "", split or "train")])
    guess = nearest(name, SOURCES)
    hint = f"; did you mean '{guess}'?" if guess else f"; named sets are {', '.join(SOURCES)}"
    raise ValueError(f"{name}: no such file, and neither a named set nor a hub id (owner/name){hint}")


def conversation_of(row: Row) -> dict[str, Any]:
    """Convert a row to a sample with `conversations`, and with its `id` and `tools` if it has them.

    Messages keep the keys that chat templates read, see TURN_KEYS.
    Raises BadSample if `read_messages` refuses the row, if it has none of the known columns, if the
    first turn after the system's is not the user's, or if two user or two assistant turns follow
    each other.
    """
    row = parse(row) if isinstance(row, bytes) else row
    if not isinstance(row, Mapping):
        raise BadSample("not a conversation", f"expected an object, got a {type(row).__name__}")
    sample = {key: row[key] for key in MEDIA_KEYS if key in row}
    sample["conversations"] = _turns(row)
    sample["tools"] = row.get("tools")
    messages, extra = read_messages(sample)
    _check_order(messages)
    messages = [{key: message[key] for key in TURN_KEYS if key in message} for message in messages]
    own_id = next((row[key] for key in ID_COLUMNS if type(row.get(key)) in (str, int)), None)
    return {**({} if own_id is None else {"id": own_id}), "conversations": messages, **extra}


def _turns(row: Mapping[str, Any]) -> Any:
    column = next((key for key in TURN_COLUMNS if row.get(key) is not None), None)
    question = _column(row, QUESTION_COLUMNS)
    answer = _column(row, ANSWER_COLUMNS)
    if column is not None:
        turns = parse_text(row[column], column)
    elif question is not None and answer is not None:
        turns = [_turn("user", _question(row, question)), _turn("assistant", _answer(row[answer]))]
    else:
        known = f"expected one of {', '.join(TURN_COLUMNS)}, or a question and its answer"
        raise BadSample("unknown columns", f"found {', '.join(map(str, row)) or 'none'}; {known}")
    if not isinstance(turns, list):
        return turns
    if column == "data" and all(isinstance(text, str) for text in turns):
        turns = [_turn("assistant" if index % 2 else "user", text) for index, text in enumerate(turns)]
    turns = [_normalised(turn) for turn in turns]
    system = next((row[key] for key in SYSTEM_COLUMNS if row.get(key)), None)
    has_own = bool(turns) and isinstance(turns[0], dict) and "system" in (turns[0].get("role"), turns[0].get("from"))
    return turns if system is None or has_own else [_turn("system", system), *turns]


def _column(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of the columns with a value, else the first that exists, or None.

    A column without a value is refused later.
    """
    there = [name for name in names if name in row]
    return next((name for name in there if row[name] is not None), there[0] if there else None)


def _turn(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _question(row: Mapping[str, Any], column: str) -> Any:
    """Return the question of a row; an instruction is followed by its input."""
    parts = [row[column], row.get("input") if column == "instruction" else None]
    texts = [part for part in parts if part]
    # A list is refused later.
    return "\n\n".join(texts) if all(isinstance(text, str) for text in texts) else parts


def _answer(answer: Any) -> Any:
    """Return the answer, without calculator notes if its last line shows that it is from GSM8K."""
    return CALCULATOR_NOTE.sub("", answer) if isinstance(answer, str) and GSM8K_RESULT.search(answer.rstrip()) else answer


def _normalised(turn: Any) -> Any:
    """Return a turn with a normalised role and without keys that have no value.

    Roles are in lower case, and other names of the assistant are replaced.
    """
    turn = parse_text(turn, "a turn")
    if not isinstance(turn, dict):
        return turn
    turn = {key: value for key, value in turn.items() if value is not None}
    key = "role" if "role" in turn else "from"
    if isinstance(turn.get(key), str):
        role = turn[key].strip().lower()
        turn[key] = "assistant" if role in ASSISTANTS else role
    return turn


def _check_order(messages: Sequence[Message]) -> None:
    roles = [message["role"] for message in messages]
    first = next(role for role in roles if role not in ("system", "developer"))
    if first != "user":
        raise BadSample(f"starts with the {first}", "expected the user's turn first, after the system's if there is one")
    for index, (role, following) in enumerate(zip(roles, roles[1:], strict=False)):
        if role == following and role in ("user", "assistant"):
            raise BadSample("roles do not alternate", f"turns {index} and {index + 1} are both the {role}'s")


def _files(name: str) -> list[Path]:
    """Return the files that a name refers to, sorted; empty if nothing has that name.

    name: a file, a folder or a glob.
    Raises ValueError for a file of an unknown type, or a folder without known files.
    """
    path = Path(name)
    if path.is_file():
        if not name.endswith(FILE_TYPES):
            raise ValueError(f"{name}: expected a file that ends in {', '.join(FILE_TYPES)}")
        return [path]
    found = path.iterdir() if path.is_dir() else [Path(file) for file in glob.glob(name)]
    files = sorted(file for file in found if file.is_file() and file.name.endswith(FILE_TYPES))
    if path.is_dir() and not files:
        raise ValueError(f"{name}: the folder holds no file that ends in {', '.join(FILE_TYPES)}")
    return files


def _file_part(path: Path) -> _Part:
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty; expected conversations")
    if path.suffix == ".parquet":
        parquet = _package("pyarrow.parquet")
        with _on_one_line(str(path)):
            num_rows = parquet.read_metadata(path).num_rows
        return _Part(partial(_table_rows, str(path), partial(_parquet_rows, path)), num_rows, "rows")
    return _Part(partial(_items if path.suffix == ".json" else _lines, path), size, "bytes")


def _hub_part(name: str, hub_id: str, config: str, split: str) -> _Part:
    datasets = _package("datasets")
    datasets.disable_progress_bars()
    with _on_one_line(name):
        dataset = datasets.load_dataset(hub_id, config or None, split=split, streaming=True)
        if dataset.features:
            dataset = dataset.decode(False)  # images are refused, so they need not be decoded
    info = (dataset.info.splits or {}).get(split)
    return _Part(partial(_table_rows, name, partial(iter, dataset)), (info and info.num_examples) or None, "rows")


def _lines(path: Path) -> Iterator[Placed]:
    """Yield the lines of a JSONL file that are not blank.

    Lines are bytes, so that a line that is not UTF-8 does not affect the others.
    """
    number = 0
    with path.open("rb") as raw:
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, start=1):
                if line.strip():
                    yield f"{path}:{number}", line, raw.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: cannot be unpacked after line {number} ({error}); fetch it again") from error


def _items(path: Path) -> Iterator[Placed]:
    """Yield the items of a JSON list, or concatenated JSON values, from a file.

    Only one item and a chunk of the file are in memory.
    Bytes that are not UTF-8 become surrogates, which are refused later.
    """
    decode = json.JSONDecoder().raw_decode
    number = 0
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read(CHUNK_CHARACTERS).lstrip()
        start = 1 if text.startswith("[") else 0
        while True:
            between = BETWEEN_ITEMS.match(text, start)
            assert between is not None  # the pattern matches the empty string too
            start = between.end()
            try:
                item, start = decode(text, start)
            except (ValueError, RecursionError) as error:
                more = file.read(max(CHUNK_CHARACTERS, len(text) - start))  # an item may be longer than a chunk
                if not more and text[start:].strip() not in ("", "]"):
                    raise ValueError(f"{path}: not JSON after row {number} ({error}); fix or fetch it again") from error
                if not more:
                    return
                text = text[start:] + more
                start = 0
                continue
            number += 1
            yield f"{path} row {number}", item, raw.tell()


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with _package("pyarrow.parquet").ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _table_rows(name: str, read: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[Placed]:
    """Yield the rows of an Arrow table, without keys that have no value in the row."""
    with _on_one_line(name):
        rows = read()
    number = 0
    while True:
        with _on_one_line(name):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        yield f"{name} row {number}", {column: _without_none(value) for column, value in row.items()}, number


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(f"this needs the package {package}: pip install 'draftspeed[data]'") from error


@contextmanager
def _on_one_line(name: str) -> Iterator[None]:
    """Convert any error of datasets, Arrow or the hub client to a one-line ValueError."""
    try:
        yield
    except Exception as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        of_hub = "check name, config, split (owner/name:config:split) and network, or give a file that you fetched"
        mend = "fetch it again" if name.endswith(FILE_TYPES) else of_hub
        raise ValueError(f"{name}: cannot be read: {problem}; {mend}") from error


def _without_none(value: Any) -> Any:
    """Remove keys whose value is None: Arrow gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
