"""JSONL conversations become documents of at most `max_tokens` tokens; whatever is cut or refused is counted and named."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from engine.config import DataSection
from engine.data.chat import Document, render, render_turns
from engine.data.messages import BadSample, Message, read_messages
from engine.data.templates import UNVERIFIED

MIN_TOKENS = 3  # row (0, 0) learns slot 1, which predicts token 2
NAMED_SAMPLES = 5

Bad = tuple[str, str, str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DataReport:
    """What became of the conversations.

    num_samples: conversations read, bad ones included. num_documents, num_tokens, num_assistant_tokens: what they became.
    by_turn: conversations that became a document per assistant turn.
    cut, split: documents above max_tokens that were shortened, or made into several.
    dropped: documents and pieces that can carry no loss: under 3 tokens, or no assistant token left.
    bad: (file:line, reason, detail) of each refused conversation.
    """

    num_samples: int
    num_documents: int
    num_tokens: int
    num_assistant_tokens: int
    by_turn: int
    cut: int
    split: int
    dropped: int
    bad: tuple[Bad, ...]

    def summary(self) -> str:
        """A few lines: totals, what was cut, and the first refused conversations by name."""
        share = self.num_assistant_tokens / max(1, self.num_tokens)
        lines = [
            f"{self.num_samples:,} conversations -> {self.num_documents:,} documents, {self.num_tokens:,} tokens, "
            f"{share:.0%} of them the assistant's"
        ]
        if self.by_turn:
            lines.append(f"{self.by_turn:,} conversations taken turn by turn")
        if self.cut or self.split or self.dropped:
            lines.append(f"{self.cut:,} cut and {self.split:,} split at max_tokens, {self.dropped:,} without loss dropped")
        return "\n".join(lines + _bad_lines(self.bad))


@dataclass
class _Collection:
    """Documents gathered so far, with the counts of `DataReport`."""

    tokenizer: PreTrainedTokenizerBase
    section: DataSection
    documents: list[Document] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, line: bytes, place: str) -> None:
        self.counts["samples"] += 1
        try:
            messages, extra = read_messages(_parse(line))
            documents = self.render(messages, extra)
        except BadSample as error:
            self.bad.append((place, error.reason, error.detail))
            return
        for document in documents:
            self.keep(document)

    def render(self, messages: list[Message], extra: dict[str, Any]) -> list[Document]:
        """The documents of a conversation: one, or one per assistant turn, as `section.turns` has it."""
        if self.section.turns != "each":
            try:
                return [render(messages, extra, self.tokenizer, self.section.template_kwargs)]
            except BadSample as error:
                if self.section.turns == "whole" or error.reason != UNVERIFIED:
                    raise
        documents = render_turns(messages, extra, self.tokenizer, self.section.template_kwargs)
        self.counts["by_turn"] += 1
        return documents

    def keep(self, document: Document) -> None:
        if len(document) > self.section.max_tokens:
            self.counts[self.section.long_documents] += 1
        for piece in fit(document, self.section.max_tokens, self.section.long_documents):
            if len(piece) < MIN_TOKENS or not piece.assistant_mask.any():
                self.counts["dropped"] += 1
            else:
                self.documents.append(piece)

    def report(self) -> DataReport:
        return DataReport(
            num_samples=self.counts["samples"],
            num_documents=len(self.documents),
            num_tokens=sum(len(document) for document in self.documents),
            num_assistant_tokens=sum(int(document.assistant_mask.sum()) for document in self.documents),
            by_turn=self.counts["by_turn"],
            cut=self.counts["cut"],
            split=self.counts["split"],
            dropped=self.counts["dropped"],
            bad=tuple(self.bad),
        )


def load_documents(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    *,
    on_progress: Progress | None = None,
) -> tuple[list[Document], DataReport]:
    """Documents of JSONL files, one conversation a line, in the order of the files.

    on_progress(bytes read, bytes in all) is called after every line.
    Raises ValueError for a missing or empty file, a file without a usable conversation, more bad samples than
    `section.max_bad_share` allows, or a tokenizer without chat template.
    """
    _check_template(tokenizer)
    files = [_existing(path) for path in paths]
    total_bytes, done_bytes = sum(path.stat().st_size for path in files), 0
    collection = _Collection(tokenizer, section)
    for path in files:
        num_documents, num_bad = len(collection.documents), len(collection.bad)
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    collection.add(line, f"{path}:{number}")
                done_bytes += len(line)
                if on_progress is not None:
                    on_progress(done_bytes, total_bytes)
        if len(collection.documents) == num_documents:
            raise ValueError("\n".join([_without_loss(path), *_bad_lines(collection.bad[num_bad:])]))
    report = collection.report()
    _check_bad_share(report, section.max_bad_share)
    return collection.documents, report


def fit(document: Document, max_tokens: int, policy: Literal["cut", "split"]) -> Iterator[Document]:
    """Pieces of a document, each of at most `max_tokens` tokens, that end with an assistant turn wherever one fits.

    'cut' gives the first piece alone, 'split' all of them; a turn longer than a piece is cut inside.
    """
    start, length = 0, len(document)
    while start < length:
        limit = start + max_tokens
        fitting = [end for end in document.turn_ends if start < end <= limit]
        stop = length if length <= limit else max(fitting, default=limit)
        turn_ends = tuple(end - start for end in document.turn_ends if start < end <= stop)
        yield Document(document.input_ids[start:stop], document.assistant_mask[start:stop], turn_ends)
        if policy == "cut":
            return
        start = stop


def count_assistant_tokens(documents: Sequence[Document], vocab_size: int) -> torch.Tensor:
    """How often the assistant says each token: int64 [V]. Raises ValueError if a token id is not below `vocab_size`."""
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for document in documents:
        said = document.input_ids[document.assistant_mask]
        if said.size and said.max() >= vocab_size:
            raise ValueError(
                f"token id {said.max()} is outside the target's vocabulary of {vocab_size}; use the target's own tokenizer"
            )
        np.add.at(counts_V, said, 1)
    return torch.from_numpy(counts_V)


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("not UTF-8", f"byte {error.start} of the line; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadSample("not JSON", f"expected one JSON object on the line: {error}") from error


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; put chat_template.jinja into its folder"
        )


def _existing(path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such file; expected JSONL with one conversation a line")
    if file.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; expected JSONL with one conversation a line")
    return file


def _without_loss(path: Path) -> str:
    return f"{path}: no conversation with an assistant token to train on; expected JSONL with one conversation a line"


def _check_bad_share(report: DataReport, max_bad_share: float) -> None:
    share = len(report.bad) / max(1, report.num_samples)
    if share > max_bad_share:
        mend = "mend or remove them, or raise data.max_bad_share to go on without them"
        lines = [f"{share:.1%} of the conversations are unusable, data.max_bad_share allows {max_bad_share:.1%}; {mend}"]
        raise ValueError("\n".join(lines + _bad_lines(report.bad)))


def _bad_lines(bad: Sequence[Bad]) -> list[str]:
    if not bad:
        return []
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(reason for _, reason, _ in bad).most_common())
    return [f"{len(bad):,} unusable: {reasons}"] + [
        f"  {place}: {reason}: {detail}" for place, reason, detail in bad[:NAMED_SAMPLES]
    ]
