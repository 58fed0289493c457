"""Show documents as text segments that are masked as assistant text or not, for users and tests."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from engine.data.documents import Document, Documents
from engine.data.messages import BadSample, parse
from engine.host.files import write_whole


class Segment(NamedTuple):
    """Text of consecutive tokens that are either all assistant tokens or all other tokens."""

    text: str
    assistant: bool


def decoded(token_ids: list[int], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    """Return the text of one sequence of tokens. options: of the tokenizer's `decode`."""
    text = tokenizer.decode(token_ids, **options)
    assert isinstance(text, str)  # a batch of sequences would be a list
    return text


def segments_of(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Return the document's text, including special tokens, split wherever its mask changes."""
    mask = document.assistant_mask
    changes = np.flatnonzero(np.diff(mask)) + 1
    edges = [0, *changes.tolist(), len(document)]
    segments = []
    for start, stop in zip(edges, edges[1:], strict=False):
        token_ids = document.input_ids[start:stop].tolist()
        text = decoded(token_ids, tokenizer, clean_up_tokenization_spaces=False)
        segments.append(Segment(text, bool(mask[start])))
    return segments


def write_segments(path: Path, documents: Documents, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all documents as one JSON list, one document per line, in their order.

    An entry is {"id", "place", "segments": [{"text", "assistant"}]}.
    id: id of the conversation, or its place if it has none.
    place: `file:line`.
    Raises WriteError if the file cannot be written.
    """

    def write(place: Path) -> None:
        with place.open("w", encoding="utf-8") as file:
            file.write("[")
            for index, own_id in enumerate(conversation_ids(documents)):
                segments = [segment._asdict() for segment in segments_of(documents[index], tokenizer)]
                entry = {"id": own_id, "place": documents.name_of(index), "segments": segments}
                file.write(",\n" if index else "\n")
                file.write(json.dumps(entry, ensure_ascii=False))
            file.write("\n]\n")

    write_whole(path, write)


def conversation_ids(documents: Documents) -> Iterator[Any]:
    """Yield the id of each document's conversation, or its place if it has none.

    Every file is read once.
    """
    reader: _LineReader | None = None
    for index in range(len(documents)):
        name = documents.name_of(index)
        place = documents[index].place
        if place is None or not documents.paths:
            yield name
            continue
        file, line = place
        path = documents.paths[file]
        if reader is None or reader.path != path:
            reader = _LineReader(path)
        own_id = _id_of(reader.line(line))
        yield name if own_id is None else own_id


class _LineReader:
    """Reads lines of a file by number, from 1; numbers must not decrease."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._numbered = enumerate(_lines(path), start=1)
        self._number = 0
        self._line = b""

    def line(self, number: int) -> bytes:
        """Return a line. Raises ValueError if the file has become too short since tokenisation."""
        while self._number < number:
            found = next(self._numbered, None)
            if found is None:
                problem = f"{self.path} no longer has line {number}: it was changed while it was read"
                raise ValueError(f"{problem}; run the same command again")
            self._number, self._line = found
        return self._line


def _lines(path: str) -> Iterator[bytes]:
    with Path(path).open("rb") as file:
        yield from file


def _id_of(line: bytes) -> Any:
    try:
        sample = parse(line)
    except BadSample:
        return None
    return sample.get("id") if isinstance(sample, dict) else None
