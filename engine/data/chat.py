"""A conversation becomes token ids and the mask of what the assistant said.

The chat template writes the text. Each reply is found by rendering the conversation up to it: the
reply is what its turn adds to the prompt that asks for it, up to the token at which a server stops,
and it must hold the words of the message. `{% generation %}` tags are verified where a template has
them, and decide where it has no generation prompt. Where a template rewrites earlier turns (drops
their reasoning, ends them otherwise), the conversation becomes one document per reply. Text that
was written with the template already is searched for what the template puts around replies.
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
    """Render a conversation whole with the tokenizer's chat template and mark the assistant's tokens.

    extra: the sample's own arguments of the template. train_on: all replies, or the last one.
    Raises BadSample where the template fails, and with reason UNVERIFIED where it rewrites earlier turns, so that the mask
    cannot be derived.
    """
    template = ChatTemplate(tokenizer, {**extra, **(template_kwargs or {})})
    replies = _chosen(_replies(messages), train_on)
    if tokenizer.is_fast and template.format.tagged:
        if not template.format.header:
            return _document_of_tags(messages, replies, template, tokenizer)
        tagged_turns(template, messages)  # which verifies the tags
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
    """Render a document per assistant turn: what a server reads and says there, with that turn alone marked.

    Raises BadSample where the template fails or writes a turn otherwise than after its generation prompt.
    """
    template = ChatTemplate(tokenizer, {**extra, **(template_kwargs or {})})
    turns, _ = _turns(template, messages, _chosen(_replies(messages), train_on))
    return [_document(turn.text, [turn], tokenizer) for turn in turns]


def render_text(text: str, markers: Markers, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "all") -> Document:
    """A document of text that was written with the chat template already. Raises BadSample where it holds no reply."""
    spans = markers.find(text)
    if not spans:
        raise BadSample("no assistant turn", f"the text holds nothing that opens a reply, as {markers.headers[0]!r} does")
    return _masked(text, _chosen(spans, train_on), tokenizer)


def _document_of_tags(
    messages: Sequence[Message], replies: Sequence[int], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> Document:
    """A document of which the template's tags mark the turns, for a template without a generation prompt."""
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
    """Return the turns of some replies, and the messages as a server would have them after these turns.

    Thinking that a prompt leaves no place for was never generated, so later turns do not read it either.
    """
    history = list(messages)
    turns = []
    for index in replies:
        turn = last_turn(template, history[: index + 1])
        history[index] = turn.reply
        turns.append(turn)
    return turns, history


def _replies(messages: Sequence[Message]) -> list[int]:
    """Turns of the assistant that answer somebody: what opens a conversation is read, not learned. Raises BadSample."""
    asked = next((index for index, message in enumerate(messages) if message["role"] in ("user", "tool")), len(messages))
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index > asked]
    if not replies:
        raise BadSample("no assistant turn", "the assistant answers nobody")
    return replies


def _chosen(replies: Sequence[Any], train_on: TrainOn) -> Sequence[Any]:
    return replies[-1:] if train_on == "last" else replies


def _document(text: str, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Document:
    """A document of which some turns are the assistant's."""
    document = _masked(text, [(turn.start, turn.end) for turn in turns], tokenizer)
    changes = tuple(turn.change for turn in turns if turn.change)
    return replace(document, changes=changes)


def _masked(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> Document:
    """A document of which the characters `spans` are the assistant's."""
    input_ids, spans = (_by_offsets if tokenizer.is_fast else _by_prefixes)(text, spans, tokenizer)
    mask = np.zeros(len(input_ids), dtype=bool)
    for first, end in spans:
        mask[first:end] = True
    return Document(np.asarray(input_ids, dtype=np.int32), mask, tuple(end for _, end in spans))


def _by_offsets(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """Token ids of `text`, and its `spans` from characters to tokens; a token across a turn's end belongs to the turn.

    Where a token would cross a turn's start, the text is cut there: a server's prompt ends there too.
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
    """Token ids, and the characters of each, counted from `offset`."""
    encoding = on_sample(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first_T, last_T = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T + offset
    return encoding["input_ids"], first_T, last_T


def _by_prefixes(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """The same for a tokenizer without offsets: the tokens up to a bound, which must be the first of the whole text's."""
    input_ids = _tokens(text, tokenizer)

    def tokens_before(position: int) -> int:
        prefix = _tokens(text[:position], tokenizer)
        if input_ids[: len(prefix)] != prefix:
            raise BadSample(UNVERIFIED, "a token crosses the bound of a turn, and the tokenizer gives no character offsets")
        return len(prefix)

    return input_ids, [(tokens_before(start), tokens_before(stop)) for start, stop in spans]


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return on_sample(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"]
