"""Text that was written with the chat template already: where the replies lie in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.data.templates import OPENED_THINKING, ChatTemplate

QUESTION, REPLY, NEXT_QUESTION, NEXT_REPLY = "First question.", "First reply.", "Second question.", "Second reply."

Span = tuple[int, int]


@dataclass(frozen=True)
class Markers:
    """What a template puts around replies.

    header: before one. thinking: the thinking block that the generation prompt opens behind the header, "" if it does not.
    ends: what may end a reply.
    """

    header: str
    thinking: str
    ends: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None) -> "Markers":
        """From a conversation whose words are known. Raises ValueError if they do not find its replies again."""
        template = ChatTemplate(tokenizer, template_kwargs or {})
        words = ((QUESTION, "user"), (REPLY, "assistant"), (NEXT_QUESTION, "user"), (NEXT_REPLY, "assistant"))
        messages = [{"role": role, "content": content} for content, role in words]
        first, last = template.last_turn(messages[:2]), template.last_turn(messages)
        prompt, asked = first.text[: first.start], template.text(messages[:1])
        header = prompt.removeprefix(asked) if prompt.startswith(asked) and prompt != asked else prompt.rpartition(QUESTION)[2]
        opened = OPENED_THINKING.search(header)
        thinking = opened[0] if opened else ""
        ends = {first.text[: first.end].rpartition(REPLY)[2], last.text[: last.end].rpartition(NEXT_REPLY)[2]}
        ends |= {token for token in template.special_tokens if last.text.partition(REPLY)[2].startswith(token)}
        markers = cls(header.removesuffix(thinking), thinking, tuple(sorted(ends - {""})))
        found = [last.text[start:end] for start, end in markers.find(last.text)] if markers.header else []
        if len(found) != 2 or any(word not in reply for word, reply in zip((REPLY, NEXT_REPLY), found, strict=True)):
            problem = "replies cannot be found in text that was written with this chat template"
            raise ValueError(f"{problem}; give messages under 'conversations' instead of 'text'")
        return markers

    def find(self, text: str) -> list[Span]:
        """Where the replies lie in a text, in characters, each with its end."""
        spans, at = [], text.find(self.header)
        while at >= 0:
            start = at + len(self.header)
            start += len(self.thinking) if text.startswith(self.thinking, start) else 0
            stops = [place + len(end) for end in self.ends if (place := text.find(end, start)) >= 0]
            spans.append((start, min(stops, default=len(text))))
            at = text.find(self.header, spans[-1][1])
        return [(start, end) for start, end in spans if start < end]
