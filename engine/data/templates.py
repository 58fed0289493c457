"""Select the chat template of a run, and render messages with it.

A template is the tokenizer's own, a named one of the folder `chat_templates/`, or a user's file.
The templates of the folder follow the published formats and are for tokenizers without a template.
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

from engine.config.data_section import NAMED_TEMPLATES
from engine.config.sections import DataSection, TargetSection
from engine.data.control_tokens import is_empty_block, special_tokens, thinking_mark
from engine.data.messages import BadSample, Message, on_sample
from engine.data.reply_shape import (
    QUESTION,
    WORDS,
    ReplyShape,
    probe_of,
    shape_of,
)
from engine.data.template_limits import bound_chat_templates

bound_chat_templates()  # before anything is rendered, in every process that renders
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    },
}

Span = tuple[int, int]


def load_tokenizer(target: TargetSection, data: DataSection) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer; if `data.template` is set, it replaces the chat template."""
    template = None if data.template is None else read_template(data.template)
    tokenizer = AutoTokenizer.from_pretrained(target.path, **target.hub_arguments)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def read_template(name: str) -> str:
    """Read the template with the given name, or the file at that path."""
    return NAMED_TEMPLATES.get(name, Path(name)).read_text(encoding="utf-8")


def template_sources(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the Jinja source of each of the tokenizer's chat templates, ordered by name."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [template[name] for name in sorted(template)]
    return [template] if template else []


@dataclass(frozen=True)
class Format:
    """Text that a template writes around a reply to one question.

    header: generation prompt after the question; "" if there is none.
    always_asked: whether the template writes the header even without add_generation_prompt.
    empty_thought: end of the header, an empty thinking block that the template does not write
        before replies; "" if there is none.
    bare: whether there is nothing between question and reply (Mistral).
    tagged: whether `{% generation %}` tags mark replies.
    tags_hold_header: whether the tags include the header of a reply.
    """

    header: str
    always_asked: bool
    empty_thought: str
    bare: bool
    tagged: bool
    tags_hold_header: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with its arguments (`tools`, `enable_thinking`, ...).

    chosen: Jinja source of the template; None = the tokenizer's template for these arguments.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]
    chosen: str | None = None

    @cached_property
    def source(self) -> str:
        """Jinja source of the template.

        If the tokenizer has several, it is "tool_use" if there are tools, and "default" otherwise.
        """
        if self.chosen is not None:
            return self.chosen
        name = self.arguments.get("chat_template")
        return self.tokenizer.get_chat_template(name, tools=self.arguments.get("tools"))

    @cached_property
    def format(self) -> Format:
        """Format of replies, found by rendering a question and a reply.

        Raises BadSample if the template cannot write them.
        """
        return _format_of(self.tokenizer, self.source, self._own_probe_arguments)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        return special_tokens(self.tokenizer, self.source)

    @cached_property
    def _own_probe_arguments(self) -> str:
        is_for_tools = isinstance(self.tokenizer.chat_template, dict) and bool(self.arguments.get("tools"))
        return self.probe_arguments(with_tool=is_for_tools)  # a template for tools need not work without any

    def probe_arguments(self, with_tool: bool) -> str:
        """Return the arguments as JSON text, with one known tool or none instead of the sample's.

        This keeps the number of distinct arguments small, so that results can be cached.
        """
        arguments = {key: value for key, value in self.arguments.items() if key != "tools"}
        if with_tool:
            arguments["tools"] = [TOOL]
        return json.dumps(arguments, sort_keys=True, default=str)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Render messages as text. Raises BadSample if the template fails."""
        options = {
            "chat_template": self.source,
            "add_generation_prompt": add_generation_prompt,
            "tokenize": False,
        }
        arguments = {**self.arguments, **options}
        return on_sample(self.tokenizer.apply_chat_template, list(messages), **arguments)

    def shape(self, reply: Message) -> ReplyShape:
        """Return how the template writes replies with the same parts as `reply`.

        Raises BadSample if it cannot write such a reply.
        """
        probe = json.dumps(probe_of(reply))
        try:
            return _shape_of(self.tokenizer, self.source, self._own_probe_arguments, probe)
        except BadSample:
            if not self.arguments.get("tools"):
                raise
        return _shape_of(self.tokenizer, self.source, self.probe_arguments(with_tool=True), probe)

    def tagged(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Render messages; return the text and the character spans of `{% generation %}` tags."""
        arguments = {**self.tokenizer.special_tokens_map, **self.arguments}
        chats = {
            "conversations": [list(messages)],
            "chat_template": self.source,
            "return_assistant_tokens_mask": True,
        }
        (text,), (spans,) = on_sample(render_jinja_template, **{**arguments, **chats})
        return text, spans


@lru_cache(maxsize=256)
def _shape_of(tokenizer: PreTrainedTokenizerBase, source: str, arguments: str, probe: str) -> ReplyShape:
    template = ChatTemplate(tokenizer, json.loads(arguments), source)
    ends = tokenizer.eos_token, tokenizer.bos_token
    return shape_of(json.loads(probe), template.text, template.special_tokens, *ends)


@lru_cache(maxsize=64)
def _format_of(tokenizer: PreTrainedTokenizerBase, source: str, arguments: str) -> Format:
    chat = ChatTemplate(tokenizer, json.loads(arguments), source)
    asked = [{"role": "user", "content": QUESTION}]
    messages = [*asked, {"role": "assistant", "content": WORDS}]
    question = chat.text(asked)
    prompt = chat.text(asked, add_generation_prompt=True)
    text = chat.text(messages)
    header = prompt.removeprefix(question) if prompt.startswith(question) else ""
    unasked_prompt = chat.shape(messages[-1]).unasked_prompt if prompt == question else ""
    header = header or unasked_prompt
    lead = text.partition(WORDS)[0]
    bare = not lead.removeprefix(question).strip()
    empty_thought = ""
    if prompt.startswith(lead) and len(question) < len(lead.rstrip()) < len(prompt):
        rest = prompt[len(lead) :]
        empty_thought = rest if is_empty_block(rest) else ""
    tagged = bool(GENERATION_TAG.search(source))
    tags_hold_header = False
    if tagged:
        marked, spans = chat.tagged(messages)
        openings = [marked[start:end].partition(WORDS)[0] for start, end in spans]
        tags_hold_header = any(_holds_more_than_thinking(opening) for opening in openings)
    return Format(header, bool(unasked_prompt), empty_thought, bare, tagged, tags_hold_header)


def _holds_more_than_thinking(opening: str) -> bool:
    """Return whether a tag holds more than an empty thinking block before the words of a reply."""
    mark = thinking_mark(opening)
    return bool(opening.removesuffix(mark.text).strip())


def template_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of special tokens that a reply may contain or end with, in ascending order.

    These are the special tokens that the chat templates write, and the end-of-text token.
    """
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
