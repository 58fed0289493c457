"""Locate assistant turns in a rendered conversation, up to the token at which a server stops."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.data.control_tokens import ThinkingMark, thinking_mark
from engine.data.messages import CLOSE, OPEN, BadSample, Message, thinking_and_words
from engine.data.reply_shape import (
    UNVERIFIED,
    ProbeWords,
    first_part,
    probe_of,
    shared_length,
    unused_words,
    without_thinking,
    written_probe,
)
from engine.data.templates import ChatTemplate, Span

CLOSED_BY_PROMPT = "thinking left out: the prompt closes the thinking block"
NOT_WRITTEN = "thinking left out: the chat template does not write it in that turn"
NOT_BEHIND_PROMPT = "thinking left out: the chat template does not write it behind its generation prompt"
NOT_OPENED = "replies without thinking behind a header alone, where the prompt also opens a thinking block"
LOST_THINKING = (CLOSED_BY_PROMPT, NOT_WRITTEN, NOT_BEHIND_PROMPT)


@dataclass(frozen=True)
class Turn:
    """A conversation that ends with a reply, as a server reads and generates it.

    text: the whole conversation.
    start, end: character range [start, end) of the reply with its end token.
    reply: the message that the text contains, without its thinking if that had to be left out.
    change: how the text differs from the message or the prompt, for the report; "" if it does not.
    """

    text: str
    start: int
    end: int
    reply: Message
    change: str


def tagged_turns(template: ChatTemplate, messages: Sequence[Message]) -> dict[int, Turn]:
    """Return the turns that the template's `{% generation %}` tags mark, by message index.

    A turn includes its end token. Raises BadSample unless there is one tag per reply, and each
    contains its whole reply.
    """
    text, spans = template.tagged(messages)
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(replies):
        raise BadSample(UNVERIFIED, f"the chat template marks {len(spans)} replies of {len(replies)}")
    turns = {}
    for index, (start, end) in zip(replies, spans, strict=True):
        reply = messages[index]
        if not holds(reply, text[start:end]):
            problem = f"what the chat template marks as turn {index} does not hold all of it"
            raise BadSample(UNVERIFIED, problem)
        end = _tagged_end(template, text, (start, end), reply)
        turns[index] = Turn(text, start, end, reply, _lost_thinking(reply, text[start:end]))
    return turns


def _tagged_end(template: ChatTemplate, text: str, span: Span, reply: Message) -> int:
    """Return where a tagged reply's end token ends, which is inside the span or just after it."""
    shape = template.shape(reply)
    stop = shape.tail[: shape.stop] or shape.next_token
    end = span[0] + len(text[span[0] : span[1]].rstrip())
    behind = text[end:]
    blanks = len(behind) - len(behind.lstrip())
    if not text[:end].endswith(stop) and behind.startswith(stop, blanks):
        return end + blanks + len(stop)
    return end


def last_turn(template: ChatTemplate, messages: Sequence[Message]) -> Turn:
    """Render messages that end with a reply, as a server reads and generates them.

    The reply is the text that its turn adds to the generation prompt, up to the token at which a
    server stops. Thinking is left out if the prompt leaves no place for it.
    Raises BadSample if the text cannot be verified.
    """
    *before, reply = messages
    number = len(before)
    finder = TurnFinder(template, before, reply)
    reply, text, start = finder.find()
    written = text[start:]
    if not holds(reply, written):
        raise BadSample(UNVERIFIED, f"the chat template leaves out words of turn {number}")
    text, end = _ended(template, reply, text, start)
    change = _lost_thinking(reply, text[start:end])
    if reply is not messages[-1]:
        change = CLOSED_BY_PROMPT if finder.prompt_closes_thinking else NOT_BEHIND_PROMPT
    elif not text.startswith(finder.prompt):
        change = NOT_OPENED
    return Turn(text, start, end, reply, change)


def _ended(template: ChatTemplate, reply: Message, text: str, start: int) -> tuple[str, int]:
    """Return the text and the end position of the reply's end token in it.

    If a reply ends with the first token of the next turn (GLM), that token is appended.
    Raises BadSample if anything but control tokens follows the words.
    """
    shape = template.shape(reply)
    written = text[start:]
    problem = "the chat template writes more than control tokens behind a reply"
    if shape.unasked_prompt and written.endswith(shape.unasked_prompt):
        text = text[: len(text) - len(shape.unasked_prompt)]
        written = text[start:]
    if not written.endswith(shape.tail):
        raise BadSample(UNVERIFIED, problem)
    body = written[: len(written) - len(shape.tail)].rstrip()
    words = thinking_and_words(reply)[1]
    if words and not reply.get("tool_calls") and not body.endswith(words.rstrip()):
        raise BadSample(UNVERIFIED, problem)
    if shape.next_token:
        text = text[: start + len(written.rstrip())] + shape.next_token
        return text, len(text)
    return text, len(text) - len(shape.tail) + shape.stop


def _lost_thinking(reply: Message, written: str) -> str:
    """Return why the thinking of a reply is missing from its text; "" if nothing is missing."""
    thinking, words = thinking_and_words(reply)
    before_words = written.rpartition(words)[0] if words else written
    if thinking.strip() and thinking.strip() not in before_words:
        return NOT_WRITTEN
    return ""


@dataclass(frozen=True)
class TurnFinder:
    """Locates the start of the last reply in a rendered conversation, after its generation prompt.

    before: messages before the reply.
    """

    template: ChatTemplate
    before: Sequence[Message]
    reply: Message

    def find(self) -> tuple[Message, str, int]:
        """Return the reply, the rendered text, and the position in it at which the reply starts.

        The returned reply lacks its thinking if that had to be left out.
        Raises BadSample if the reply cannot be located.
        """
        thinks = bool(thinking_and_words(self.reply)[0].strip())
        if thinks and self.prompt_closes_thinking:
            return self._silent().find()
        text = self._text
        if text.startswith(self.prompt):
            if self.prompt == self._unasked and not self._asked_always:
                self._check_header()
            written = text[len(self.prompt) :]
            if thinks and self._mark.kind == "opened" and written.lstrip().startswith(CLOSE):
                written = thinking_and_words(self.reply)[0].strip() + written
            return self.reply, self.prompt + written, len(self.prompt)
        if not thinks and not holds(self.reply, text):
            raise BadSample(UNVERIFIED, f"the chat template leaves out words of turn {len(self.before)}")
        if thinks and self._mark.kind == "none":
            silent = self._silent()
            if silent._text.startswith(self.prompt):
                return silent.find()
        return self._behind_header()

    @cached_property
    def prompt(self) -> str:
        """Text that a server reads before the reply."""
        return self.template.text(self.before, add_generation_prompt=True)

    @property
    def prompt_closes_thinking(self) -> bool:
        """Whether the prompt contains an empty thinking block, so that no thinking follows it."""
        return self._mark.kind == "closed"

    @cached_property
    def _unasked(self) -> str:
        return self.template.text(self.before)

    @cached_property
    def _text(self) -> str:
        return self.template.text([*self.before, self.reply])

    @cached_property
    def _header(self) -> str:
        """Generation prompt alone; "" if there is none."""
        header = self.template.format.header
        if self.prompt.startswith(self._unasked) and not self._asked_always:
            return self.prompt[len(self._unasked) :]
        return header if self.prompt.endswith(header) else ""

    @cached_property
    def _asked_always(self) -> bool:
        """Whether the prompt ends with a header that the template always writes."""
        plain = self.template.format
        return plain.always_asked and self.prompt.endswith(plain.header)

    @cached_property
    def _mark(self) -> ThinkingMark:
        """Thinking mark of the generation prompt."""
        empty_thought = self.template.format.empty_thought
        if empty_thought and self._header.endswith(empty_thought):
            return ThinkingMark("closed", empty_thought)
        return thinking_mark(self._header)

    @cached_property
    def _lead(self) -> str:
        """Text up to the first part of the reply, found by rendering a probe in its place."""
        return self._lead_behind(self.before)

    def _lead_behind(self, before: Sequence[Message]) -> str:
        words = self._words
        probe = probe_of(self.reply, words)
        _, text = written_probe(probe, before, self.template.text, words)
        return text[: first_part(text, words)]

    @cached_property
    def _words(self) -> ProbeWords:
        """Words for the probe that occur neither in the messages before it nor in their text."""
        given = [*self.before, self.template.arguments]
        as_text = json.dumps(given, ensure_ascii=False, default=str)
        return unused_words("\n".join([as_text, self._unasked, self.prompt]))

    @cached_property
    def _history_end(self) -> int:
        """End of the last message before the reply, as a position in `_lead`; 0 if not written.

        The text after that message is written by the template. It is found by rendering other words
        instead of the message.
        """
        if not self.before or not self.before[-1]["content"].strip():
            return 0
        *earlier, last = self.before
        replaced = last | {"content": self._words.last_message}
        lead = self._lead_behind([*earlier, replaced])
        _, written, behind = lead.rpartition(self._words.last_message)
        if not written:
            return 0
        return len(self._lead) - shared_length(self._lead[::-1], behind[::-1])

    def _silent(self) -> "TurnFinder":
        """Return a finder for the reply without thinking. Raises BadSample if nothing is left."""
        reply = without_thinking(self.reply)
        if not reply["content"].strip() and not reply.get("tool_calls"):
            problem = f"turn {len(self.before)} only thinks, and the prompt closes the thinking block"
            raise BadSample(UNVERIFIED, problem)
        return TurnFinder(self.template, self.before, reply)

    def _check_header(self) -> None:
        """Raise BadSample if there is no generation prompt here but there may be a header.

        There is no header if the first part of the reply follows immediately, or if the text before
        it also follows the generation prompt of a question.
        """
        if self.template.format.bare:
            return
        if not self._lead.startswith(self._unasked):
            raise self._misfit()
        opening = self._lead[len(self._unasked) :]
        if not opening.strip():
            return
        if self.template.format.header and opening == self.template.shape(self.reply).opening:
            return
        problem = f"there is no generation prompt, so the header of turn {len(self.before)} cannot be told from the reply"
        raise BadSample(UNVERIFIED, problem)

    def _behind_header(self) -> tuple[Message, str, int]:
        """Locate the reply after the last header before its first part; put it after the prompt.

        Used if the rendered reply does not follow its prompt: the prompt opens a thinking block
        that replies do not keep (DeepSeek) or contains an empty one (Gemma 4), or the template
        rewrites earlier text once the reply is there (GPT-OSS).
        """
        text = self._text
        mark = self._mark
        header = self._header.removesuffix(mark.text)
        at = self._lead.rfind(header)
        if not header.strip() or at < 0 or not text.startswith(self._lead):
            raise self._misfit()
        start = at + len(header)
        if start < self._history_end:
            raise self._misfit()
        if mark.kind == "opened":
            return self._in_opened_block(start)
        opening = self._lead[start:]
        rest = text[start:]
        if mark.kind == "closed" and opening.startswith(mark.text.rstrip()):
            rest = rest[len(mark.text.rstrip()) :].lstrip()
        elif opening.strip() and not self._follows_prompt_elsewhere(opening):
            raise self._misfit()
        return self.reply, self.prompt + rest, len(self.prompt)

    def _in_opened_block(self, start: int) -> tuple[Message, str, int]:
        """Put a reply after a prompt that opens a thinking block.

        start: position in the text after the header.
        """
        rest = self._text[start:]
        opening = self._lead[start:].lstrip()
        opened = self._mark.text.strip()
        thinking = thinking_and_words(self.reply)[0].strip()
        if opening.startswith(opened):
            return self.reply, self.prompt + rest.lstrip()[len(opened) :].lstrip(), len(self.prompt)
        closes = opening.startswith(CLOSE)
        if not thinking:
            if closes:
                return self.reply, self.prompt + rest.lstrip(), len(self.prompt)
            header = self.prompt.removesuffix(self._mark.text)
            return self.reply, header + rest, len(header)
        if closes:
            return self.reply, self.prompt + thinking + rest.lstrip(), len(self.prompt)
        if opened != OPEN or opening.strip():
            raise self._misfit()
        written = f"{thinking}\n{CLOSE}\n\n{rest.lstrip()}"
        return self.reply, self.prompt + written, len(self.prompt)

    def _follows_prompt_elsewhere(self, opening: str) -> bool:
        """Return whether such a reply has this opening after a question's generation prompt."""
        return opening == self.template.shape(self.reply).opening

    def _misfit(self) -> BadSample:
        problem = f"the chat template does not write turn {len(self.before)} after its generation prompt"
        return BadSample(UNVERIFIED, problem)


def holds(reply: Message, written: str) -> bool:
    """Return whether a text contains a reply: its words and calls, or else its thinking."""
    thinking, words = thinking_and_words(reply)
    calls = [call.get("function", call)["name"] for call in reply.get("tool_calls") or ()]
    parts = [words, *calls] if words or calls else [thinking]
    return all(part.strip() in written for part in parts) and any(part.strip() for part in parts)
