"""Locate the replies in text that is already rendered with a chat template."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.data.control_tokens import thinking_mark
from engine.data.messages import BadSample, Message
from engine.data.reply_shape import QUESTION, UNVERIFIED
from engine.data.templates import TOOL, ChatTemplate, Span
from engine.data.turns import last_turn

REPLY = "First reply."
RESULT = "First result."
NEXT_QUESTION = "Second question."
NEXT_REPLY = "Second reply."
CALL = {"id": "functions.search:0", "type": "function", "function": {"name": "search", "arguments": {"query": "it"}}}
PLAIN = ((QUESTION, "user"), (REPLY, "assistant"), (NEXT_QUESTION, "user"), (NEXT_REPLY, "assistant"))
WITH_TOOLS = ((QUESTION, "user"), ("", "assistant"), (RESULT, "tool"), (REPLY, "assistant"))


@dataclass(frozen=True)
class Markers:
    """Texts that a template writes around replies.

    headers: texts that precede a reply, longest first.
    thinking: thinking block that the generation prompt writes after the header; "" if it writes
        none.
    ends: texts that may end a reply.
    others: special tokens that start a turn of another role.
    """

    headers: tuple[str, ...]
    thinking: str
    ends: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None) -> "Markers":
        """Derive the markers of a tokenizer's template by rendering conversations with known words.

        Raises ValueError if the markers do not locate the replies of such a conversation.
        """
        template = ChatTemplate(tokenizer, template_kwargs or {})
        found = _Found()
        messages = [_message(*turn) for turn in PLAIN]
        found.learn(template, messages)
        with suppress(BadSample):  # not every template supports tools
            found.learn(template, [_message(*turn) for turn in WITH_TOOLS])
        if isinstance(tokenizer.chat_template, dict):  # there may be a separate template for tools
            with_tools = ChatTemplate(tokenizer, {**(template_kwargs or {}), "tools": [TOOL]})
            with suppress(BadSample):
                found.learn(with_tools, [_message(*turn) for turn in WITH_TOOLS])
        marks = [thinking_mark(header).text for header in found.headers]
        thinking = max(marks, key=len)
        headers = {header.removesuffix(thinking) for header in found.headers} - {""}
        others = {token for token in found.others - found.ends if token not in found.replies}
        markers = cls(tuple(sorted(headers, key=len, reverse=True)), thinking, tuple(sorted(found.ends)), tuple(sorted(others)))
        text = last_turn(template, messages).text
        with suppress(BadSample):
            replies = [text[start:end] for start, end in markers.find(text)]
            if len(replies) == 2 and REPLY in replies[0] and NEXT_REPLY in replies[1]:
                return markers
        problem = "replies cannot be found in text that was written with this chat template"
        raise ValueError(f"{problem}; give messages under 'conversations' instead of 'text'")

    def find(self, text: str) -> list[Span]:
        """Return the character spans of the replies in a text, each including its end token.

        Raises BadSample if a reply contains a token that starts a turn of another role, so that the
        end of the reply is unknown.
        """
        spans = []
        at = 0
        while found := [(place, -len(header)) for header in self.headers if (place := text.find(header, at)) >= 0]:
            place, length = min(found)
            start = place - length
            start += len(self.thinking) if text.startswith(self.thinking, start) else 0
            stops = [place + len(end) for end in self.ends if (place := text.find(end, start)) >= 0]
            at = max(min(stops, default=len(text)), start)
            if start < at:
                spans.append((start, at))
            if foreign := next((token for token in self.others if token in text[start:at]), None):
                raise BadSample(UNVERIFIED, f"a reply in the text holds {foreign!r}, which starts a turn of another role")
        return spans


def _message(words: str, role: str) -> Message:
    message: Message = {"role": role, "content": words}
    if role == "tool":
        message |= {"name": "search", "tool_call_id": CALL["id"]}
    return message if words else message | {"tool_calls": [CALL]}


@dataclass
class _Found:
    """Markers found so far in conversations with known words. replies: all replies concatenated."""

    headers: list[str] = field(default_factory=list)
    ends: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    replies: str = ""

    def learn(self, template: ChatTemplate, messages: Sequence[Message]) -> None:
        """Add headers and ends of a conversation's replies, and tokens that start other turns."""
        whole = template.text(messages)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = last_turn(template, messages[: index + 1])
            words = messages[index - 1]["content"]
            header = template.text(messages[:index], add_generation_prompt=True).rpartition(words)[2]
            self.headers.append(_own_part(header, template.text(messages[:index]).rpartition(words)[2], template))
            replies = turn.text[turn.start : turn.end]
            self.replies += replies
            tokens = [token for token in template.special_tokens if replies.endswith(token)]
            self.ends |= set(tokens[:1]) or {replies.rpartition(message["content"])[2]} - {""}
            asked = turn.text.partition(words)[0]
            self.others |= {token for _, token in [max((asked.rfind(token), token) for token in template.special_tokens)]}
            history = whole.partition(message["content"])[2] if message["content"] else ""
            following = {token for token in template.special_tokens if history.startswith(token)}
            self.ends |= {token for token in following if replies.endswith(token) or token not in replies}


def _own_part(header: str, unasked: str, template: ChatTemplate) -> str:
    """Return the part of a header that requests the reply.

    The end of the previous turn is removed: the template writes it without a generation prompt too.
    header, unasked: text after the previous message, with and without the generation prompt.
    """
    kept = header
    while token := next((token for token in template.special_tokens if kept.startswith(token)), ""):
        if not unasked.startswith(token):
            break
        blank = len(kept[len(token) :]) - len(kept[len(token) :].lstrip())
        kept = kept[len(token) + blank :]
        unasked = unasked[len(token) :].lstrip()
    return kept or header
