"""Conversations answered anew by the target itself: a draft then learns to guess what the target would say, not others.

Every assistant turn is replaced, in order, by the target's reply to what stands before it, its own earlier replies included.
Two kinds are kept as they were: a turn that tool results follow, as these answer its own calls, and one before any question.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from engine.config.data_section import DataSection, RegenerateSection
from engine.conversations.journal import Journal, as_line
from engine.conversations.server import Server, as_sent, served_model
from engine.data.messages import BadSample, Message, parse, read_messages
from engine.host.telemetry import ProgressBar, Telemetry

NAMED_CONVERSATIONS = 5
LOST_IN_A_ROW = 3  # requests at least, and as many as a server has at a time, before it is taken for dead


class Unfinished(ValueError):
    """A run that ended before its time; what it has done is kept."""


@dataclass(frozen=True)
class Line:
    """A line of the inputs. index: among all of them. number: in its file, from 1."""

    index: int
    path: Path
    number: int
    text: bytes

    @property
    def place(self) -> str:
        return f"{self.path}:{self.number}"


@dataclass
class RegenerationReport:
    """What became of the conversations.

    num_conversations: in the inputs. by_earlier_runs, regenerated, unchanged: in the output; unchanged have no turn to replace.
    num_replies, num_tokens: that this run got. kept_turns: assistant turns of its conversations that are as they were.
    left_out: reason -> conversations. named: (file:line, reason, detail) of the first. missing: left out, but not for good: the
    next run asks for them again.
    """

    output: Path
    num_conversations: int = 0
    by_earlier_runs: int = 0
    regenerated: int = 0
    unchanged: int = 0
    num_replies: int = 0
    num_tokens: int = 0
    kept_turns: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[tuple[str, str, str]] = field(default_factory=list)
    missing: int = 0
    seconds: float = 0.0

    def leave_out(self, place: str, error: BadSample) -> None:
        self.left_out[error.reason] += 1
        if len(self.named) < NAMED_CONVERSATIONS:
            self.named.append((place, error.reason, error.detail))

    @property
    def num_left_out(self) -> int:
        return self.left_out.total()

    def check_left_out(self, max_bad_share: float, mend: str) -> None:
        """Raises ValueError if too many conversations are left out, or all."""
        share = self.num_left_out / max(1, self.num_conversations)
        if share > max_bad_share or self.num_left_out == self.num_conversations:
            lines = [f"{share:.1%} of the conversations are left out, data.max_bad_share allows {max_bad_share:.1%}; {mend}"]
            raise ValueError("\n".join(lines + self._left_out_lines()))

    def summary(self) -> str:
        """A few lines: totals, and what was left out, the first of them by name."""
        lines = [
            f"{self.output}: {self.num_conversations - self.num_left_out:,} of {self.num_conversations:,} conversations: "
            f"{self.regenerated:,} regenerated, {self.by_earlier_runs:,} by earlier runs, {self.unchanged:,} without a turn to "
            f"replace",
            f"{self.num_replies:,} replies of {self.num_tokens:,} tokens in {self.seconds:.0f} s; "
            f"{self.kept_turns:,} assistant turns kept as they were",
        ]
        lines += self._left_out_lines()
        if self.missing:
            again = f"The same command asks again for {self.missing:,} of those left out"
            lines.append(f"{again}; without it, {partial_of(self.output)} can be deleted")
        return "\n".join(lines)

    def _left_out_lines(self) -> list[str]:
        if not self.left_out:
            return []
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
        named = [f"  {place}: {reason}: {detail}" for place, reason, detail in self.named]
        return [f"{self.num_left_out:,} left out: {reasons}", *named]


def partial_of(output: Path) -> Path:
    """Where the conversations are kept until the output has them all."""
    return output.with_name(f"{output.name}.partial")


class Regeneration:
    """One run over the inputs; section and data are the recipe's. api_key: that the servers ask for, if they do."""

    def __init__(self, section: RegenerateSection, data: DataSection, telemetry: Telemetry, api_key: str = "none") -> None:
        self.section = section
        self.data = data
        self.telemetry = telemetry
        self._api_key = api_key
        assert section.output is not None, "a regeneration needs regenerate.output"
        self.inputs = [Path(path) for path in section.inputs]
        self.output = Path(section.output)
        self.report = RegenerationReport(self.output)
        self._journal: Journal | None = None
        self._start = 0.0

    def run(self) -> RegenerationReport:
        """Regenerate what earlier runs have not, and write the output.

        Raises Unfinished if it is interrupted or a server dies, ConfigError for servers that cannot be used, JournalError for
        the journal of another job, ValueError if more is left out than `data.max_bad_share` allows.
        """
        try:
            with self.telemetry.stage("Reading the conversations"):
                checksums = self._survey()
            with ExitStack() as stack:
                asyncio.run(self._ask(checksums, stack))
                self._finish(self._open_journal)
        except (KeyboardInterrupt, Unfinished) as error:
            raise Unfinished(f"{str(error) or 'stopped by hand'}{self._what_is_done()}") from error
        self.report.seconds = time.perf_counter() - self._start
        return self.report

    @property
    def _open_journal(self) -> Journal:
        """The journal, from when the servers have named their model."""
        assert self._journal is not None, "the journal is not open yet"
        return self._journal

    def _survey(self) -> list[str]:
        """Count the conversations, and those that no server need be asked about; the files' checksums."""
        for line in self._lines():
            self.report.num_conversations += 1
            try:
                read_conversation(line.text)
            except BadSample as error:
                self.report.leave_out(line.place, error)
        mend = "mend or remove them, or raise data.max_bad_share to go on without them"
        self.report.check_left_out(self.data.max_bad_share, mend)
        return [checksum(path) for path in self.inputs]

    async def _ask(self, checksums: list[str], stack: ExitStack) -> None:
        """Have the servers answer what is missing. stack: keeps the journal open."""
        section = self.section
        servers = [Server(address, section.attempts, section.timeout_s, self._api_key) for address in section.servers]
        try:
            model = await served_model(servers, section.model)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            journal = Journal(partial_of(self.output), self._decided_by(model, checksums))
            self._journal = stack.enter_context(journal)
            await self._answer_all(servers, self._settings(model))
        finally:
            for server in servers:
                await server.close()

    def _decided_by(self, model: str, checksums: list[str]) -> dict[str, Any]:
        return {
            "bytes of regenerate.inputs": checksums,
            "regenerate.model": model,
            "regenerate.temperature": self.section.temperature,
            "regenerate.max_new_tokens": self.section.max_new_tokens,
            "data.template_kwargs": self.data.template_kwargs,
        }

    def _settings(self, model: str) -> dict[str, Any]:
        """What all requests have in common."""
        settings = {"model": model, "temperature": self.section.temperature, "max_tokens": self.section.max_new_tokens}
        kwargs = self.data.template_kwargs
        return settings | ({"chat_template_kwargs": kwargs} if kwargs else {})

    async def _answer_all(self, servers: Sequence[Server], settings: dict[str, Any]) -> None:
        report = self.report
        missing = self._missing()
        report.by_earlier_runs = len(self._open_journal)
        with self.telemetry.progress(report.num_conversations, "conversations") as bar:
            bar.start_at(report.by_earlier_runs + report.num_left_out)
            self._start = time.perf_counter()
            of_each = range(self.section.concurrency)
            await asyncio.gather(*(self._work(server, settings, missing, bar) for _ in of_each for server in servers))

    async def _work(self, server: Server, settings: dict[str, Any], missing: Iterator[Line], bar: ProgressBar) -> None:
        """Take one conversation after the other, until none is left. Raises Unfinished if the server is dead."""
        for line in missing:
            try:
                sample = await self._answer(line, server, settings)
            except BadSample as error:
                self.report.leave_out(line.place, error)
                self.report.missing += 1
                if server.unanswered >= max(LOST_IN_A_ROW, self.section.concurrency):
                    raise Unfinished(f"{server.address} does not answer any more: {error.detail}") from error
            else:
                self._open_journal.add(line.index, sample)
            seconds = time.perf_counter() - self._start
            replies = self.report.num_replies / seconds
            tokens = self.report.num_tokens / seconds
            bar.advance(f"{replies:,.1f} replies/s, {tokens:,.0f} tokens/s")

    async def _answer(self, line: Line, server: Server, settings: dict[str, Any]) -> dict[str, Any]:
        """The sample with the target's replies. Raises BadSample if one of them does not come, or cannot be used."""
        sample, messages, extra = read_conversation(line.text)
        to_answer = set(turns_to_answer(messages))
        told: list[Message] = []
        for turn, message in enumerate(messages):
            if turn in to_answer:
                reply = await server.reply(settings | extra | {"messages": [as_sent(before) for before in told]})
                self.report.num_replies += 1
                self.report.num_tokens += reply.num_tokens
                message = reply.message
            told.append(message)
        self.report.regenerated += bool(to_answer)
        self.report.unchanged += not to_answer
        self.report.kept_turns += sum(message["role"] == "assistant" for message in messages) - len(to_answer)
        own_id = sample.get("id")
        return sample | {"id": f"{line.path.stem}-{line.number}" if own_id is None else own_id, "conversations": told}

    def _finish(self, journal: Journal) -> None:
        mend = "the same command asks for the missing ones again; or raise data.max_bad_share to go on without them"
        self.report.check_left_out(self.data.max_bad_share, mend)
        journal.write_to(self.output)
        if not self.report.missing:
            journal.delete()

    def _missing(self) -> Iterator[Line]:
        """Lines that a server is to be asked about."""
        for line in self._lines():
            if line.index in self._open_journal:
                continue
            try:
                read_conversation(line.text)
            except BadSample:
                continue  # the survey has counted it
            yield line

    def _lines(self) -> Iterator[Line]:
        """Lines of the inputs that are not blank."""
        index = 0
        for path in self.inputs:
            with path.open("rb") as lines:
                for number, text in enumerate(lines, start=1):
                    if text.strip():
                        yield Line(index, path, number, text)
                    index += 1

    def _what_is_done(self) -> str:
        if self._journal is None:
            return "; the same command goes on from where it was"
        done = f"{len(self._journal):,} of {self.report.num_conversations:,} conversations are done"
        return f"; {done}, and the same command goes on from there"


def read_conversation(text: bytes) -> tuple[dict[str, Any], list[Message], dict[str, Any]]:
    """The sample on a line of JSONL, with its messages and template arguments as `read_messages` has them. Raises BadSample."""
    sample = parse(text)
    try:
        as_line(sample)
    except ValueError as error:
        raise BadSample("not JSON", f"expected what JSON in UTF-8 can say: {error}") from error
    return sample, *read_messages(sample)


def turns_to_answer(messages: Sequence[Message]) -> Iterator[int]:
    """The assistant's turns that are replaced: those after a question, but not those that tool results follow."""
    asked = False
    for turn, message in enumerate(messages):
        asked = asked or message["role"] in ("user", "tool")
        calls_tools = turn + 1 < len(messages) and messages[turn + 1]["role"] == "tool"
        if message["role"] == "assistant" and asked and not calls_tools:
            yield turn


def checksum(path: Path) -> str:
    """Of a file's bytes, as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
