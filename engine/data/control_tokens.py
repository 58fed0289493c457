"""Control tokens in the text that chat templates write: ends of turns, and thinking tags.

A control token is a special token of the tokenizer, or a tag such as `<|im_end|>` or `[/INST]` that
the template writes. These functions are given only text that the template wrote, never the words of
a message.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from transformers import PreTrainedTokenizerBase

TAG = r"(?:<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\])"
THINKING_NAME = re.compile(r"think|thought|reason|inner|analysis", re.IGNORECASE)
CLOSING_NAME = re.compile(r"^[<\[]/|[<\[]\|?(?:end|close)|(?:end|close|suffix|stop)\|?[>\]]$|^<[^|<>]+\|>$", re.IGNORECASE)
TAG_PAIR_AT_END = re.compile(rf"(?P<first>{TAG})\s*\w*\s*(?P<second>{TAG})\s*$")
TAG_AT_END = re.compile(rf"(?P<tag>{TAG})(?P<name>\w*)\s*$")

PromptThinking = Literal["none", "opened", "closed"]


@dataclass(frozen=True)
class ThinkingMark:
    """Whether a generation prompt opens a thinking block, closes it, or has none.

    kind: 'opened' if the model continues inside a thinking block, 'closed' if the prompt contains
        an empty one, 'none' otherwise.
    text: the end of the prompt that holds the block's tags, including whitespace; "" for 'none'.
    """

    kind: PromptThinking
    text: str


NO_MARK = ThinkingMark("none", "")


def thinking_mark(header: str) -> ThinkingMark:
    """Return the thinking mark of a generation prompt's header, judged by its last tags."""
    last = TAG_AT_END.search(header)
    if last is None or header[last.end("name") :].strip():
        return NO_MARK
    pair = TAG_PAIR_AT_END.search(header)
    if pair is not None and THINKING_NAME.search(pair[0]) and _closes(pair["second"]):
        opening_is_thinking = THINKING_NAME.search(header[pair.start("first") : pair.start("second")])
        start = pair.start() if opening_is_thinking else pair.start("second")
        return ThinkingMark("closed", header[start:])
    if not THINKING_NAME.search(last[0]):
        return NO_MARK
    return ThinkingMark("closed" if _closes(last["tag"]) else "opened", header[last.start() :])


def is_empty_block(text: str) -> bool:
    """Return whether a text consists of an opening tag, at most one word, and a closing tag."""
    pair = TAG_PAIR_AT_END.fullmatch(text.lstrip())
    return pair is not None


def _closes(tag: str) -> bool:
    return CLOSING_NAME.search(tag) is not None


@lru_cache(maxsize=64)
def special_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    """Return a tokenizer's special tokens, longest first.

    template: source of the template, so that the cached result is not used for another one.
    """
    added = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
    return tuple(sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True))


def leading_token(text: str, known: Sequence[str]) -> str:
    """Return the control token at the start of text that a template wrote; "" if there is none."""
    for token in known:
        if text.startswith(token):
            return token
    tag = re.match(TAG, text)
    return "" if tag is None else tag[0]


def token_ends(text: str, known: Sequence[str]) -> list[tuple[str, int]]:
    """Return (token, end position) of each token in a text of control tokens and whitespace."""
    found = []
    position = len(text) - len(text.lstrip())
    while token := leading_token(text[position:], known):
        position += len(token)
        found.append((token, position))
        rest = text[position:]
        position += len(rest) - len(rest.lstrip())
    return found


def token_tail(text: str, known: Sequence[str]) -> str:
    """Return the longest suffix of control tokens and blanks, from its first token on."""
    tail = re.search(rf"(?:(?:{_any_token(known)})\s*)+$", text)
    return "" if tail is None else tail[0]


def whole_token_start(text: str, start: int, known: Sequence[str]) -> int:
    """Return `start`, or, if it lies inside a control token, the end of that token."""
    for token in re.finditer(_any_token(known), text):
        if token.start() < start < token.end():
            return token.end()
    return start


def _any_token(known: Sequence[str]) -> str:
    return "|".join([*map(re.escape, known), TAG])
