"""Chat templates: which one a run uses, and what it makes of messages.

A template is the tokenizer's own, one of `chat_templates/` by name, or a user's file. Those of the folder are written to the
published formats, for tokenizers that come without one.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from engine.config import DataSection, TargetSection
from engine.data.messages import BadSample, Message, on_sample
from engine.data_config import NAMED_TEMPLATES

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
OPENED_THINKING = re.compile(r"<think>\s*$")
UNVERIFIED = "mask cannot be verified"


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


@dataclass(frozen=True)
class Turn:
    """text: of a conversation that ends with a reply; [start, end): the reply with its end token, in characters of it."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with its arguments (`tools`, `enable_thinking`, ...)."""

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]

    @cached_property
    def marks_replies(self) -> bool:
        """Whether it has `{% generation %}` tags."""
        return bool(GENERATION_TAG.search(self.tokenizer.get_chat_template(tools=self.arguments.get("tools"))))

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        return tuple(added.content for added in self.tokenizer.added_tokens_decoder.values() if added.special)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Raises BadSample where the template fails."""
        template = self.tokenizer.apply_chat_template
        prompt = {"add_generation_prompt": add_generation_prompt}
        return on_sample(template, list(messages), tokenize=False, **prompt, **self.arguments)

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and what its tags mark of each reply, in characters. Raises BadSample unless that holds the reply."""
        arguments = {**self.tokenizer.special_tokens_map, **self.arguments}
        template = self.tokenizer.get_chat_template(tools=arguments.get("tools"))
        chats = {"conversations": [list(messages)], "chat_template": template, "return_assistant_tokens_mask": True}
        (text,), (spans,) = on_sample(render_jinja_template, **chats, **arguments)
        replies = [message for message in messages if message["role"] == "assistant"]
        if len(spans) != len(replies):
            raise BadSample(UNVERIFIED, f"the chat template marks {len(spans)} replies of {len(replies)}")
        for number, (reply, (start, end)) in enumerate(zip(replies, spans, strict=True)):
            if spoken(reply) not in text[start:end]:
                raise BadSample(UNVERIFIED, f"what the chat template marks as reply {number} does not hold its words")
        return text, spans

    def last_turn(self, messages: Sequence[Message]) -> Turn:
        """Messages that end with a reply, as a server reads and says them. Raises BadSample where that cannot be verified.

        The reply is what its turn adds to the prompt that asks for it, up to the token that ends it.
        """
        *before, reply = messages
        prompt, text, index = self.text(before, add_generation_prompt=True), self.text(messages), len(before)
        if not text.startswith(prompt):
            text, prompt = self._with_thinking(prompt, text, reply, index)
        if len(text) == len(prompt):
            raise BadSample(UNVERIFIED, f"the chat template does not write turn {index} after its generation prompt")
        opens_with_reply = text[len(prompt) :].lstrip().startswith(reply["content"].strip())
        if not opens_with_reply and prompt == self.text(before):
            problem = f"the chat template has no generation prompt, so the header of turn {index} cannot be told from the reply"
            raise BadSample(UNVERIFIED, problem)
        end = self._end_of(reply, text, len(prompt), index)
        if end is None and (token := self._next_header(messages, text)):
            text = text.rstrip() + token
        return Turn(text, len(prompt), end or len(text))

    def _with_thinking(self, prompt: str, text: str, reply: Message, index: int) -> tuple[str, str]:
        """Text and prompt where the prompt opens a thinking block that the template leaves out of replies (DeepSeek R1)."""
        opened = OPENED_THINKING.search(prompt)
        header = prompt[: opened.start()] if opened else prompt
        if not text.startswith(header):
            raise BadSample(UNVERIFIED, f"the chat template does not write turn {index} after its generation prompt")
        thinking = reply.get("reasoning_content") or reply["content"].rpartition("</think>")[0].replace("<think>", "")
        if not thinking.strip():
            return text, header
        return f"{prompt}{thinking.strip()}\n</think>\n\n{text[len(header) :].lstrip()}", prompt

    def _end_of(self, reply: Message, text: str, start: int, index: int) -> int | None:
        """Just after the reply's end token, in characters of `text`; None where its words end the text.

        Raises BadSample if there is more than special tokens and blanks behind its words, or they are not there.
        """
        end, following = len(text.rstrip()), None
        while not self._is_all(reply, text[start:end]):
            token = next((token for token in self.special_tokens if text.endswith(token, start, end)), None)
            if token is None:
                raise BadSample(UNVERIFIED, f"the chat template leaves out words of turn {index}, or writes more behind them")
            following, end = end, len(text[: end - len(token)].rstrip())
        return following

    def _is_all(self, reply: Message, said: str) -> bool:
        """Whether nothing of a reply is missing from what was said, and nothing follows it."""
        words, calls = spoken(reply), [call.get("function", call).get("name", "") for call in reply.get("tool_calls") or []]
        if words and not calls:
            return said.endswith(words)
        return words in said and all(name in said for name in calls) and not said.endswith(self._closing_tokens)

    @property
    def _closing_tokens(self) -> tuple[str, ...]:
        """Tokens that may end a turn but no tool call."""
        return tuple(token for token in self.special_tokens if "tool_call" not in token and "tool▁call" not in token)

    def _next_header(self, messages: Sequence[Message], text: str) -> str:
        """The special token that opens the next speaker's turn: with some targets (GLM) a reply ends by saying it."""
        role, question = "tool" if messages[-1].get("tool_calls") else "user", "Go on."
        followed = self.text([*messages, {"role": role, "content": question}]).rpartition(question)[0]
        last_words = (spoken(messages[-1]) or text.rstrip())[-16:]
        after = followed.rpartition(last_words)[2].lstrip()
        tokens = [token for token in self.special_tokens if after.startswith(token) and token != self.tokenizer.bos_token]
        return max(tokens, key=len, default="")


def spoken(reply: Message) -> str:
    """What a reply says after its thinking."""
    return reply["content"].rpartition("</think>")[2].strip()


def template_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that a reply may hold or end with: those that the chat template writes, and the end of text."""
    template, asked = tokenizer.get_chat_template(), [{"role": "user", "content": "Who?"}]
    for messages in (asked, [*asked, {"role": "assistant", "content": "I."}, *asked]):
        with suppress(BadSample):
            template += ChatTemplate(tokenizer, {}).text(messages)
    written = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in template]
    return sorted({*written, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
