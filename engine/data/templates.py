"""Chat templates: which one a run uses, and what it makes of messages.

A template is the tokenizer's own, one of `chat_templates/` by name, or a user's file. Those of the folder are written to the
published formats, for tokenizers that come without one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from engine.config import DataSection, TargetSection
from engine.data.messages import BadSample, Message, on_sample, thinking_and_words
from engine.data_config import NAMED_TEMPLATES

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
OPENED_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")
UNVERIFIED = "mask cannot be verified"
QUESTION, REPLY, NEXT = "First question.", "First reply.", "Go on."
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    },
}
ANCHORS = (16, 8)  # characters of a reply's end by which it is found again

Span = tuple[int, int]


def load_tokenizer(target: TargetSection, data: DataSection) -> PreTrainedTokenizerBase:
    """The target's tokenizer, with `data.template` for its chat template."""
    template = None if data.template is None else read_template(data.template)
    tokenizer = AutoTokenizer.from_pretrained(target.path, **target.hub_arguments)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def read_template(name: str) -> str:
    """A template by its name, or of a file."""
    return NAMED_TEMPLATES.get(name, Path(name)).read_text(encoding="utf-8")


def template_sources(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the Jinja source of the tokenizer's chat template, or of all of them where it has several named ones."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [template[name] for name in sorted(template)]
    return [template] if template else []


@dataclass(frozen=True)
class Turn:
    """text: of a conversation that ends with a reply; [start, end): the reply with its end token, in characters of it."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Format:
    """What a template does to a reply whose words are known.

    endings: the special tokens behind it, of which the first ends it. by_header: whether it ends by saying the special token
    that opens the next speaker's turn (GLM). header: the generation prompt, "" if there is none; bare: whether nothing stands
    between the turn before and the reply (Mistral). marks: whether `{% generation %}` tags mark replies; marks_more: also
    their headers.
    """

    endings: tuple[str, ...]
    by_header: bool
    header: str
    bare: bool
    marks: bool
    marks_more: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with its arguments (`tools`, `enable_thinking`, ...).

    chosen: Jinja source of the template; None = the tokenizer's own for these arguments.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]
    chosen: str | None = None

    @cached_property
    def source(self) -> str:
        """Jinja source of the template; of several named ones, "tool_use" if there are tools, else "default"."""
        if self.chosen is not None:
            return self.chosen
        return self.tokenizer.get_chat_template(self.arguments.get("chat_template"), tools=self.arguments.get("tools"))

    @cached_property
    def format(self) -> Format:
        """Found by rendering a question and a reply. Raises BadSample if the template cannot write these."""
        arguments = {key: value for key, value in self.arguments.items() if key != "tools"}
        if isinstance(self.tokenizer.chat_template, dict) and self.arguments.get("tools"):
            arguments["tools"] = [TOOL]  # a template for tools need not work without any
        return _format_of(self.tokenizer, self.source, json.dumps(arguments, sort_keys=True, default=str))

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        return special_tokens(self.tokenizer, self.source)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Raises BadSample where the template fails."""
        options = {"chat_template": self.source, "add_generation_prompt": add_generation_prompt, "tokenize": False}
        return on_sample(self.tokenizer.apply_chat_template, list(messages), **{**self.arguments, **options})

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text, and what its tags mark of each reply with its end token, in characters.

        Raises BadSample unless that holds the whole reply, and no header.
        """
        text, spans = self._tagged(messages)
        replies = [message for message in messages if message["role"] == "assistant"]
        if len(spans) != len(replies):
            raise BadSample(UNVERIFIED, f"the chat template marks {len(spans)} replies of {len(replies)}")
        if self.format.marks_more:
            raise BadSample(UNVERIFIED, "the chat template's {% generation %} tags mark more than replies")
        whole = []
        for number, (reply, (start, end)) in enumerate(zip(replies, spans, strict=True)):
            ending = next((token for token in self.special_tokens if text.startswith(token, end)), "")
            if not text[start:end].rstrip().endswith(self.special_tokens) and ending in self.format.endings:
                end += len(ending)  # tags that leave out the end token
            if not self._holds(reply, text[start:end]):
                raise BadSample(UNVERIFIED, f"what the chat template marks as reply {number} does not hold all of it")
            whole.append((start, end))
        return text, whole

    def _tagged(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        arguments = {**self.tokenizer.special_tokens_map, **self.arguments}
        chats = {"conversations": [list(messages)], "chat_template": self.source, "return_assistant_tokens_mask": True}
        (text,), (spans,) = on_sample(render_jinja_template, **{**arguments, **chats})
        return text, spans

    def last_turn(self, messages: Sequence[Message]) -> Turn:
        """Messages that end with a reply, as a server reads and says them. Raises BadSample where that cannot be verified.

        The reply is what its turn adds to the prompt that asks for it, up to the token that ends it.
        """
        text, start = self._reply_behind_prompt(messages)
        *before, reply = messages
        said, plain = text[start:], self.format
        if not self._holds(reply, said):
            raise BadSample(UNVERIFIED, f"the chat template leaves out words of turn {len(before)}")
        behind = self._behind(reply, said)
        if plain.by_header:
            token = self._next_header(messages, said)
            text = text[: start + len(said.rstrip())] + token
            return Turn(text, start, len(text))
        if not plain.endings and not behind:
            return Turn(text, start, len(text))
        if not behind:
            raise BadSample(UNVERIFIED, f"the chat template writes more than an end token behind turn {len(before)}")
        return Turn(text, start, start + behind)

    def _reply_behind_prompt(self, messages: Sequence[Message]) -> tuple[str, int]:
        """The text up to a reply's end, and where in it the reply begins."""
        *before, reply = messages
        prompt, text = self.text(before, add_generation_prompt=True), self.text(messages)
        if not text.startswith(prompt):
            return self._joined(prompt, text, messages)
        words = thinking_and_words(reply)[1]
        opens_with_words = words and text[len(prompt) :].lstrip().startswith(words)
        if not opens_with_words and not self.format.bare and prompt == self.text(before):
            problem = f"there is no generation prompt, so the header of turn {len(before)} cannot be told from the reply"
            raise BadSample(UNVERIFIED, problem)
        return text, len(prompt)

    def _joined(self, prompt: str, text: str, messages: Sequence[Message]) -> tuple[str, int]:
        """The same where the template writes a reply otherwise than behind its prompt.

        Either the prompt opens a thinking block that replies do not keep (DeepSeek), or what stands before is rewritten once
        the reply is there (GPT-OSS): then the reply is cut out behind the last message before it.
        """
        *before, reply = messages
        problem = f"the chat template does not write turn {len(before)} after its generation prompt"
        opened = OPENED_THINKING.search(prompt)
        header = prompt[: opened.start()] if opened else prompt
        if opened and text.startswith(header):
            thinking, rest = thinking_and_words(reply)[0].strip(), text[len(header) :]
            if not thinking:
                return text, len(header)
            closing = "" if rest.lstrip().startswith("</think>") else "\n</think>\n\n"
            return f"{prompt}{thinking}{closing}{rest if not closing else rest.lstrip()}", len(prompt)
        header, last = self.format.header, before[-1]["content"] if before else ""
        behind = text.rfind(last) + len(last) if last and last in text else len(text)
        at = text.find(header, behind) if header and prompt.endswith(header) else -1
        if at < 0:
            raise BadSample(UNVERIFIED, problem)
        return prompt + text[at + len(header) :], len(prompt)

    def _holds(self, reply: Message, said: str) -> bool:
        """Whether all of a reply is in what was said: its words and calls, or else its thinking."""
        thinking, words = thinking_and_words(reply)
        calls = [call.get("function", call)["name"] for call in reply.get("tool_calls") or ()]
        parts = [words, *calls] if words or calls else [thinking]
        return all(part.strip() in said for part in parts) and any(part.strip() for part in parts)

    def _behind(self, reply: Message, said: str) -> int:
        """Where the token that ends a reply ends, in characters of what was said; 0 = nothing but blanks is behind it."""
        words = thinking_and_words(reply)[1]
        if words and not reply.get("tool_calls"):
            return self._end_token_behind(words, said)
        body = said.rstrip()
        if self.format.endings:
            tail = len(body)
            for token in reversed(self.format.endings):
                if not body.endswith(token, 0, tail):
                    break
                end, tail = tail, len(body[: tail - len(token)].rstrip())
            else:
                return end
        return len(body) if reply.get("tool_calls") and body.endswith(self.special_tokens) else 0

    def _end_token_behind(self, words: str, said: str) -> int:
        """Raises BadSample if there is more than special tokens and blanks behind the words."""
        end, first = len(said.rstrip()), 0
        while not said[:end].endswith(words):
            token = next((token for token in self.special_tokens if said.endswith(token, 0, end)), None)
            if token is None:
                raise BadSample(UNVERIFIED, "the chat template writes more than special tokens behind a reply")
            first, end = end, len(said[: end - len(token)].rstrip())
        return first

    def _next_header(self, messages: Sequence[Message], said: str) -> str:
        """The special token that opens the turn behind a reply. Raises BadSample if it cannot be found."""
        role = "tool" if messages[-1].get("tool_calls") else "user"
        followed = self.text([*messages, {"role": role, "content": NEXT}]).rpartition(NEXT)[0]
        for length in ANCHORS:
            _, found, after = followed.rpartition(said.rstrip()[-length:])
            tokens = [token for token in self.special_tokens if after.lstrip().startswith(token)] if found else []
            if tokens:
                return max(tokens, key=len)
        raise BadSample(UNVERIFIED, f"what ends turn {len(messages) - 1} cannot be found")


@lru_cache(maxsize=64)
def special_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    """Those of a tokenizer, longest first. template: of the tokenizer, so that a change is noticed."""
    added = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
    return tuple(sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True))


@lru_cache(maxsize=64)
def _format_of(tokenizer: PreTrainedTokenizerBase, template: str, arguments: str) -> Format:
    plain, asked = ChatTemplate(tokenizer, json.loads(arguments), template), [{"role": "user", "content": QUESTION}]
    messages, marks = [*asked, {"role": "assistant", "content": REPLY}], bool(GENERATION_TAG.search(template))
    behind, endings = plain.text(messages).rpartition(REPLY)[2].strip(), []
    while token := next((token for token in plain.special_tokens if behind.startswith(token)), ""):
        endings.append(token)
        behind = behind[len(token) :].lstrip()
    marked = [text[start:end] for text, spans in [plain._tagged(messages)] for start, end in spans] if marks else []
    more = any(not span.strip().startswith(REPLY) and "<think>" not in span for span in marked)
    by_header = False
    if not endings:
        after = plain.text([*messages, {"role": "user", "content": NEXT}]).rpartition(REPLY)[2].lstrip()
        opening = [token for token in plain.special_tokens if after.startswith(token)]
        by_header = bool(opening) and tokenizer.bos_token not in opening
    question, prompt = plain.text(asked), plain.text(asked, add_generation_prompt=True)
    header = prompt.removeprefix(question) if prompt.startswith(question) else ""
    bare = plain.text(messages).removeprefix(question).lstrip().startswith(REPLY)
    return Format(tuple(endings), by_header, header, bare, marks, more)


def template_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that a reply may hold or end with: those that the chat templates write, and the end of text."""
    asked = [{"role": "user", "content": "Who?"}]
    answered = [*asked, {"role": "assistant", "content": "I."}, *asked]
    texts = []
    for source in template_sources(tokenizer):
        texts.append(source)
        for messages in (asked, answered):
            with suppress(BadSample):
                texts.append(ChatTemplate(tokenizer, {}, source).text(messages))
    everything = "\n".join(texts)
    special = [(index, token) for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    written = [index for index, token in special if token.content in everything]
    return sorted({*written, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
