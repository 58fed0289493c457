"""Turn JSONL conversations into documents of at most `max_tokens` tokens.

Conversations that are cut, split or refused are counted and named in a report.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import xxhash
from transformers import PreTrainedTokenizerBase

from engine.config.sections import DataSection
from engine.data.chat import render, render_text, render_turns
from engine.data.documents import Document, DocumentList
from engine.data.messages import BadSample, Message, parse, read_messages, written_text
from engine.data.preformatted import Markers
from engine.data.reply_shape import QUESTION, UNVERIFIED, WORDS
from engine.data.template_input import DEVELOPER_AS_SYSTEM, accepted_arguments, accepted_roles
from engine.data.template_limits import exceeds_limits
from engine.data.templates import ChatTemplate
from engine.data.turns import LOST_THINKING

MIN_TOKENS = 3  # row (0, 0) learns slot 1, which predicts token 2
NAMED_SAMPLES = 5
MAX_EXCEEDED = 10  # consecutive conversations for which the template exceeds its limits; each may take seconds
SHOW_ALL = "launcher/inspect_data.py --bad FILE lists all"
CHUNK_BYTES = 1 << 20

Bad = tuple[str, str, str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Chunk:
    """Consecutive whole lines of a file.

    file: index of the file among those read.
    offset, size: in bytes.
    first_line: number of the first line, from 1.
    """

    path: str
    file: int
    offset: int
    size: int
    first_line: int

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (line number, line) for each line that is not blank."""
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            for number, line in enumerate(file.read(self.size).split(b"\n"), start=self.first_line):
                if line.strip():
                    yield number, line


@dataclass(frozen=True)
class Scan:
    """State of conversation files on disk.

    content: hash of each file's bytes.
    stamps: modification time and size of each file.
    """

    chunks: tuple[Chunk, ...]
    content: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return sum(chunk.size for chunk in self.chunks)

    @classmethod
    def of(cls, paths: Sequence[str], chunk_bytes: int = CHUNK_BYTES) -> "Scan":
        """Read each file once. Raises ValueError if a file is missing or empty."""
        chunks = []
        content = []
        stamps = []
        for number, path in enumerate(paths):
            stamps.append(stamp(_existing(path)))
            digest = xxhash.xxh3_128()
            offset = 0
            size = 0
            first_line = 1
            num_lines = 0
            with Path(path).open("rb") as file:
                for line in file:
                    digest.update(line)
                    size = size + len(line)
                    num_lines = num_lines + 1
                    if size >= chunk_bytes:
                        chunks.append(Chunk(path, number, offset, size, first_line))
                        offset = offset + size
                        size = 0
                        first_line = first_line + num_lines
                        num_lines = 0
            if size:
                chunks.append(Chunk(path, number, offset, size, first_line))
            content.append(digest.hexdigest())
        return cls(tuple(chunks), tuple(content), tuple(stamps))


def stamp(path: Path) -> tuple[int, int]:
    """Return a file's modification time in ns and its size in bytes, to detect changes."""
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size


@dataclass
class Rendered:
    """Documents rendered from some lines, with counts for the report.

    bad: (file index, line, reason, detail) of each refused conversation.
    long: (file index, line, tokens of its longest document) of each conversation with a document
        above max_tokens.
    counts: `samples`, `by_turn`, `cut`, `split` and `dropped`, defined in `DataReport`.
    changes: defined in `DataReport`.
    """

    documents: list[Document] = field(default_factory=list)
    bad: list[tuple[int, int, str, str]] = field(default_factory=list)
    long: list[tuple[int, int, int]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Renderer:
    """Renders lines of conversation files as documents, with the options of `section`."""

    tokenizer: PreTrainedTokenizerBase
    section: DataSection

    def __call__(self, chunk: Chunk) -> Rendered:
        """Render the lines of a chunk.

        Raises ValueError if the template exceeds its limits for `MAX_EXCEEDED` conversations in a row.
        """
        rendered = Rendered()
        num_exceeded = 0
        for number, line in chunk.lines():
            rendered.counts["samples"] += 1
            try:
                documents = self.documents_of(line, rendered)
            except BadSample as error:
                detail = error.detail
                if exceeds_limits(error):
                    num_exceeded += 1
                    detail = f"{template_name(self.tokenizer, self.section.template)}: {detail}"
                rendered.bad.append((chunk.file, number, error.reason, detail))
                if num_exceeded == MAX_EXCEEDED:
                    problem = f"{chunk.path}:{number}: {detail}"
                    raise ValueError(f"{problem}. This happened for {MAX_EXCEEDED} conversations in a row") from error
                continue
            num_exceeded = 0
            longest = max(map(len, documents))
            if longest > self.section.max_tokens:
                rendered.long.append((chunk.file, number, longest))
            for document in documents:
                self._keep(replace(document, place=(chunk.file, number)), rendered)
        return rendered

    def documents_of(self, line: bytes, rendered: Rendered) -> list[Document]:
        """Return the documents of a conversation, before any is cut to `max_tokens`.

        There is one document, or one per assistant turn, as `section.turns` selects.
        Raises BadSample if the conversation cannot be used.
        """
        sample = parse(line)
        if (text := written_text(sample)) is not None:
            return [render_text(text, self._markers, self.tokenizer, self.section.train_on)]
        messages, extra = read_messages(sample)
        template = ChatTemplate(self.tokenizer, {**extra, **(self.section.template_kwargs or {})})
        accepted = accepted_roles(messages, template)
        alternatives = accepted_arguments(accepted, template)
        documents = self._render_any(alternatives, extra, rendered.counts)
        if accepted != messages:
            rendered.changes[DEVELOPER_AS_SYSTEM] += 1
        rendered.changes.update(self._changes(documents))
        return documents

    def _changes(self, documents: Sequence[Document]) -> set[str]:
        """Return the differences between the rendered replies and their messages.

        Raises BadSample if thinking is missing and `lost_thinking` refuses such a conversation.
        """
        changes = {change for document in documents for change in document.changes}
        lost = sorted(changes.intersection(LOST_THINKING))
        if lost and self.section.lost_thinking == "refuse":
            raise BadSample("thinking left out", f"{'; '.join(lost)}; data.lost_thinking=count trains on the rest")
        return changes

    def _render_any(self, alternatives: list[list[Message]], extra: dict[str, Any], counts: Counter[str]) -> list[Document]:
        """Render the first alternative that the template accepts.

        If it accepts none, the error of the first alternative is raised, because that is the usual
        form.
        """
        first, *others = alternatives
        try:
            return self._render(first, extra, counts)
        except BadSample:
            for other in others:
                with suppress(BadSample):
                    return self._render(other, extra, counts)
            raise

    @cached_property
    def _markers(self) -> Markers:
        return Markers.of(self.tokenizer, self.section.template_kwargs)

    def _render(self, messages: list[Message], extra: dict[str, Any], counts: Counter[str]) -> list[Document]:
        arguments = messages, extra, self.tokenizer, self.section.template_kwargs, self.section.train_on
        if self.section.turns != "each":
            try:
                return [render(*arguments)]
            except BadSample as error:
                if self.section.turns == "whole" or error.reason != UNVERIFIED:
                    raise
        documents = render_turns(*arguments)
        counts["by_turn"] += 1
        return documents

    def _keep(self, document: Document, rendered: Rendered) -> None:
        if len(document) > self.section.max_tokens:
            rendered.counts[self.section.long_documents] += 1
        for piece in fit(document, self.section.max_tokens, self.section.long_documents):
            if len(piece) < MIN_TOKENS or not piece.assistant_mask.any():
                rendered.counts["dropped"] += 1
            else:
                rendered.documents.append(piece)


class UnusableData(ValueError):
    """Too few conversations can be used. bad: defined in `DataReport`."""

    def __init__(self, message: str, bad: Sequence[Bad]) -> None:
        super().__init__(message)
        self.bad = tuple(bad)


@dataclass(frozen=True)
class DataReport:
    """Counts of conversations read, and of the documents made from them.

    num_samples: conversations read, including refused ones.
    num_documents, num_tokens, num_assistant_tokens: totals of the resulting documents.
    by_turn: conversations that became one document per assistant turn.
    cut, split: documents above max_tokens that were shortened, or split into several.
    dropped: documents and pieces that carry no loss: under 3 tokens, or without an assistant token.
    changes: number of conversations for each kind of difference between the text and the messages.
    bad: (file:line, reason, detail) of each refused conversation.
    long: (file:line, tokens of its longest document) of each conversation that was cut or split.
    """

    num_samples: int
    num_documents: int
    num_tokens: int
    num_assistant_tokens: int
    by_turn: int
    cut: int
    split: int
    dropped: int
    changes: dict[str, int]
    bad: tuple[Bad, ...]
    long: tuple[tuple[str, int], ...]

    def summary(self) -> str:
        """Return a few lines: totals, and the first refused or overlong conversations by name."""
        share = self.num_assistant_tokens / max(1, self.num_tokens)
        lines = [
            f"{self.num_samples:,} conversations -> {self.num_documents:,} documents, {self.num_tokens:,} tokens, "
            f"{share:.0%} of them assistant tokens"
        ]
        if self.by_turn:
            lines.append(f"{self.by_turn:,} conversations rendered turn by turn")
        lines += [f"{count:,} conversations with {change}" for change, count in sorted(self.changes.items())]
        if self.cut or self.split or self.dropped:
            lines.append(f"{self.cut:,} cut and {self.split:,} split at max_tokens, {self.dropped:,} dropped (no loss)")
        if self.long:
            first = ", ".join(f"{place} ({tokens:,} tokens)" for place, tokens in self.long[:NAMED_SAMPLES])
            lines.append(f"  too long: {first}" + (", ..." if len(self.long) > NAMED_SAMPLES else ""))
        return "\n".join(lines + _bad_lines(self.bad))


class Tally:
    """Accumulates a `DataReport`; call `add` with the result of each chunk of a scan, in order.

    on_progress: see `load_documents`.
    """

    def __init__(self, paths: Sequence[str], scan: Scan, on_progress: Progress | None) -> None:
        self._paths = paths
        self._on_progress = on_progress
        self._bytes_done = 0
        self._num_bytes = scan.num_bytes
        self._counts: Counter[str] = Counter()
        self._changes: Counter[str] = Counter()
        self._usable: Counter[int] = Counter()
        self._bad: list[Bad] = []
        self._long: list[tuple[str, int]] = []

    def add(self, chunk: Chunk, rendered: Rendered) -> None:
        self._counts += rendered.counts
        self._changes += rendered.changes
        self._usable[chunk.file] += len(rendered.documents)
        self._counts["documents"] += len(rendered.documents)
        self._counts["tokens"] += sum(map(len, rendered.documents))
        self._counts["assistant_tokens"] += sum(int(document.assistant_mask.sum()) for document in rendered.documents)
        self._bad += [(f"{self._paths[file]}:{line}", reason, detail) for file, line, reason, detail in rendered.bad]
        self._long += [(f"{self._paths[file]}:{line}", tokens) for file, line, tokens in rendered.long]
        self._bytes_done += chunk.size
        if self._on_progress is not None:
            self._on_progress(self._bytes_done, self._num_bytes)

    @property
    def report(self) -> DataReport:
        """Report on all chunks added.

        Raises UnusableData, naming the first refused conversations, if a file gave no document.
        """
        for number, path in enumerate(self._paths):
            if not self._usable[number]:
                own = [bad for bad in self._bad if bad[0].rpartition(":")[0] == path]
                problem = "no conversation with an assistant token to train on; expected JSONL with one conversation per line"
                raise UnusableData("\n".join([f"{path}: {problem}", *_bad_lines(own)]), self._bad)
        counted = {f"num_{name}": self._counts[name] for name in ("samples", "documents", "tokens", "assistant_tokens")}
        counted |= {name: self._counts[name] for name in ("by_turn", "cut", "split", "dropped")}
        return DataReport(**counted, changes=dict(self._changes), bad=tuple(self._bad), long=tuple(self._long))


def load_documents(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    *,
    on_progress: Progress | None = None,
) -> tuple[DocumentList, DataReport]:
    """Read JSONL files with one conversation per line into documents in memory, in this process.

    Documents are in the order of the files. on_progress(bytes read, total bytes) is called
    after each chunk.
    Raises ValueError if a file is missing, empty or without a usable conversation, if more samples
    are unusable than `section.max_bad_share` allows, or if the tokenizer has no chat template.
    """
    check_template(tokenizer, section.template_kwargs, section.template)
    scan = Scan.of(paths)
    documents = []
    tally = Tally(paths, scan, on_progress)
    render_chunk = Renderer(tokenizer, section)
    for chunk in scan.chunks:
        rendered = render_chunk(chunk)
        tally.add(chunk, rendered)
        documents += rendered.documents
    report = tally.report
    check_bad_share(report, section.max_bad_share)
    return DocumentList(documents, paths), report


def fit(document: Document, max_tokens: int, policy: Literal["cut", "split"]) -> Iterator[Document]:
    """Yield pieces of a document of at most `max_tokens` tokens each.

    A piece ends with the last assistant turn that fits; a turn longer than a piece is cut inside.
    policy: 'cut' yields only the first piece, 'split' all of them.
    """
    start = 0
    length = len(document)
    while start < length:
        limit = start + max_tokens
        fitting = [end for end in document.turn_ends if start < end <= limit]
        stop = length if length <= limit else max(fitting, default=limit)
        turn_ends = tuple(end - start for end in document.turn_ends if start < end <= stop)
        yield replace(
            document,
            input_ids=document.input_ids[start:stop],
            assistant_mask=document.assistant_mask[start:stop],
            turn_ends=turn_ends,
        )
        if policy == "cut":
            return
        start = stop


def template_name(tokenizer: PreTrainedTokenizerBase, chosen: str | None) -> str:
    """Return words that name the chat template, for messages. chosen: `data.template`."""
    return f"the chat template of {tokenizer.name_or_path!r}" if chosen is None else f"data.template={chosen}"


def check_template(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None, chosen: str | None = None
) -> None:
    """Raise ValueError if the tokenizer has no chat template that can be used.

    It has none, or several and no "default", or one that exceeds its limits for a question and a
    reply of a few words.
    chosen: `data.template`.
    """
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has the chat templates {names}, and none named 'default'; "
            "name a template in data.template"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; name one in data.template, or put "
            "chat_template.jinja into its folder"
        )
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": WORDS}]
    try:
        ChatTemplate(tokenizer, template_kwargs or {}).text(messages)
    except BadSample as error:
        if exceeds_limits(error):
            name = template_name(tokenizer, chosen)
            raise ValueError(f"{name} cannot render even a short conversation: {error.detail}") from error


def check_bad_share(report: DataReport, max_bad_share: float) -> None:
    """Raise UnusableData if a larger share of the conversations is unusable than `max_bad_share`.

    The message names the first of them.
    """
    share = len(report.bad) / max(1, report.num_samples)
    if share > max_bad_share:
        mend = "fix or remove them, or raise data.max_bad_share to continue without them"
        lines = [f"{share:.1%} of the conversations are unusable, data.max_bad_share allows {max_bad_share:.1%}; {mend}"]
        raise UnusableData("\n".join(lines + _bad_lines(report.bad)), report.bad)


def _existing(path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such file; expected JSONL with one conversation per line")
    if file.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; expected JSONL with one conversation per line")
    return file


def _bad_lines(bad: Sequence[Bad]) -> list[str]:
    """Return lines with the number of refused conversations and the first one for each reason."""
    if not bad:
        return []
    first = {reason: f"{place}: {detail}" for place, reason, detail in reversed(bad)}
    counts = Counter(reason for _, reason, _ in bad).most_common()
    lines = [f"  {count:,} {reason}{', first' if count > 1 else ''}: {first[reason]}" for reason, count in counts]
    return [f"{len(bad):,} unusable ({SHOW_ALL}):", *lines]
