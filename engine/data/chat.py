"""Render conversations as token ids with a mask of the assistant tokens.

The chat template writes the text. Each reply is located by rendering the conversation up to it.
The reply is the text that its turn adds to the generation prompt, up to the token at which a server
stops, and it must contain the words of the message. If a template has `{% generation %}` tags, they
are checked against this; if it has no generation prompt, the tags locate the replies. If a template
rewrites earlier turns (drops their reasoning, or ends them differently), the conversation becomes
one document per reply. In text that is already rendered, replies are located by the markers that
the template puts around them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from engine.data.documents import Document
from engine.data.messages import BadSample, Message, on_sample
from engine.data.preformatted import Markers
from engine.data.reply_shape import UNVERIFIED
from engine.data.templates import ChatTemplate, Span
from engine.data.turns import Turn, last_turn, tagged_turns

TrainOn = Literal["all", "last"]


def render(
    messages: Sequence[Message],
    extra: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
    train_on: TrainOn = "all",
) -> Document:
    """Render a whole conversation as one document and mask its assistant tokens.

    extra: template arguments from the sample.
    train_on: "all" marks every reply, "last" only the last one.
    Raises BadSample if the template fails. The reason is UNVERIFIED if the template rewrites
    earlier turns, so that the mask cannot be derived.
    """
    template = ChatTemplate(tokenizer, {**extra, **(template_kwargs or {})})
    replies = _chosen(_replies(messages), train_on)
    if tokenizer.is_fast and template.format.tagged:
        if not template.format.header:
            return _document_of_tags(messages, replies, template, tokenizer)
        tagged_turns(template, messages)  # verifies the tags
    turns, messages = _turns(template, messages, replies)
    text = turns[-1].text if replies[-1] == len(messages) - 1 else template.text(messages)
    for index, turn in zip(replies, turns, strict=True):
        if not text.startswith(turn.text[: turn.end]):
            raise BadSample(UNVERIFIED, f"the chat template writes turn {index} differently once later turns follow")
    return _document(text, turns, tokenizer)


def render_turns(
    messages: Sequence[Message],
    extra: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
    train_on: TrainOn = "all",
) -> list[Document]:
    """Render one document per assistant turn, with only that turn marked.

    Each document is the text that a server reads and generates at that turn.
    The parameters are those of `render`.
    Raises BadSample if the template fails, or if a turn does not follow its generation prompt.
    """
    template = ChatTemplate(tokenizer, {**extra, **(template_kwargs or {})})
    turns, _ = _turns(template, messages, _chosen(_replies(messages), train_on))
    return [_document(turn.text, [turn], tokenizer) for turn in turns]


def render_text(text: str, markers: Markers, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "all") -> Document:
    """Tokenise text that is already rendered with the chat template, and mask its assistant tokens.

    Raises BadSample if the text contains no reply.
    """
    spans = markers.find(text)
    if not spans:
        raise BadSample("no assistant turn", f"the text contains no reply header such as {markers.headers[0]!r}")
    return _masked(text, _chosen(spans, train_on), tokenizer)


def _document_of_tags(
    messages: Sequence[Message], replies: Sequence[int], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> Document:
    """Render a document of a template without generation prompt; its tags locate the turns."""
    if template.format.tags_hold_header:
        raise BadSample(UNVERIFIED, "the chat template's {% generation %} tags mark more than replies")
    tagged = tagged_turns(template, messages)
    turns = [tagged[index] for index in replies]
    for index, turn in zip(replies, turns, strict=True):
        prompt = template.text(messages[:index])
        if not turn.text.startswith(prompt) or turn.start < len(prompt):
            raise BadSample(UNVERIFIED, f"the chat template writes turn {index} differently once later turns follow")
    return _document(turns[-1].text, turns, tokenizer)


def _turns(template: ChatTemplate, messages: Sequence[Message], replies: Sequence[int]) -> tuple[list[Turn], list[Message]]:
    """Return the turns of the given replies, and the messages as a server has them afterwards.

    If a prompt leaves no place for thinking, the thinking is never generated, so later turns do not
    read it either.
    """
    history = list(messages)
    turns = []
    for index in replies:
        turn = last_turn(template, history[: index + 1])
        history[index] = turn.reply
        turns.append(turn)
    return turns, history


def _replies(messages: Sequence[Message]) -> list[int]:
    """Return the indices of assistant turns that come after a user or tool turn.

    An assistant turn that opens a conversation is context only.
    Raises BadSample if there is no reply.
    """
    asked = next((index for index, message in enumerate(messages) if message["role"] in ("user", "tool")), len(messages))
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index > asked]
    if not replies:
        raise BadSample("no assistant turn", "no assistant turn follows a user or tool turn")
    return replies


def _chosen(replies: Sequence[Any], train_on: TrainOn) -> Sequence[Any]:
    return replies[-1:] if train_on == "last" else replies


def _document(text: str, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Document:
    """Tokenise `text` and mark the given turns as assistant tokens."""
    document = _masked(text, [(turn.start, turn.end) for turn in turns], tokenizer)
    changes = tuple(turn.change for turn in turns if turn.change)
    return replace(document, changes=changes)


def _masked(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> Document:
    """Tokenise `text` and mark the character ranges `spans` as assistant tokens."""
    input_ids, spans = (_by_offsets if tokenizer.is_fast else _by_prefixes)(text, spans, tokenizer)
    mask = np.zeros(len(input_ids), dtype=bool)
    for first, end in spans:
        mask[first:end] = True
    return Document(np.asarray(input_ids, dtype=np.int32), mask, tuple(end for _, end in spans))


def _by_offsets(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """Tokenise `text`, and convert `spans` from characters to tokens with the tokenizer's offsets.

    A token that crosses the end of a turn belongs to the turn. If a token would cross the start of
    a turn, the text is split there before tokenisation, because a server's prompt ends there too.
    """
    input_ids, first_T, last_T = _encoded(text, 0, tokenizer)
    crossed = [start for start, _ in spans if ((first_T < start) & (start < last_T)).any()]
    if crossed:
        cuts = [0, *crossed, len(text)]
        pieces = [_encoded(text[cut:stop], cut, tokenizer) for cut, stop in zip(cuts, cuts[1:], strict=False)]
        input_ids = [token for ids, _, _ in pieces for token in ids]
        first_T, last_T = (np.concatenate([piece[side] for piece in pieces]) for side in (1, 2))
    bounds = [(np.searchsorted(last_T, start, side="right"), np.searchsorted(first_T, stop)) for start, stop in spans]
    return input_ids, [(int(first), int(end)) for first, end in bounds]


def _encoded(text: str, offset: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return the token ids of `text` and the character bounds of each token, plus `offset`."""
    encoding = on_sample(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first_T, last_T = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T + offset
    return encoding["input_ids"], first_T, last_T


def _by_prefixes(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """Tokenise `text`, and convert its `spans` to tokens, with a tokenizer that gives no offsets.

    A bound is the number of tokens of the text before it.
    Raises BadSample if these are not the first tokens of the whole text.
    """
    input_ids = _tokens(text, tokenizer)

    def tokens_before(position: int) -> int:
        prefix = _tokens(text[:position], tokenizer)
        if input_ids[: len(prefix)] != prefix:
            raise BadSample(UNVERIFIED, "a token crosses the bound of a turn, and the tokenizer gives no character offsets")
        return len(prefix)

    return input_ids, [(tokens_before(start), tokens_before(stop)) for start, stop in spans]


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return on_sample(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"]
