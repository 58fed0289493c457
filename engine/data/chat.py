"""A conversation becomes token ids and the mask of what the assistant said.

The tokenizer's chat template writes the text. Which tokens are the assistant's is read from the template's
`{% generation %}` tags; a template without them is rendered once per prefix of the conversation, and the text that a turn
adds after its generation prompt is the turn. Both cover a reply and its end-of-turn token, not the template around them.
A template that rewrites earlier turns (drops their reasoning, ends them otherwise) gives a document a reply instead.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

ROLES = {"user", "assistant", "system", "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
UNVERIFIED = "mask cannot be verified"

Message = dict[str, Any]
Span = tuple[int, int]
TextOf = Callable[..., str]


class BadSample(ValueError):
    """A conversation that cannot be used: `reason` is the category it is counted under, `detail` says what came."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Document:
    """A rendered conversation, or a piece of one.

    input_ids: int32 [T].
    assistant_mask: bool [T], true for the assistant's replies with their end-of-turn tokens.
    turn_ends: ascending token indices, each just after an assistant turn.
    """

    input_ids: np.ndarray
    assistant_mask: np.ndarray
    turn_ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


def read_messages(sample: Any) -> tuple[list[Message], dict[str, Any]]:
    """Messages (role, content, and every other key as it came) and template arguments (`tools`) of a JSON sample.

    Accepts `role`/`content` and ShareGPT's `from`/`value`. Raises BadSample.
    """
    turns = sample.get("conversations") if isinstance(sample, dict) else None
    if not isinstance(turns, list):
        raise BadSample("not a conversation", "expected an object whose key 'conversations' holds a list of turns")
    _refuse_media(sample, "the sample")
    messages = [_read_turn(turn, f"turn {index}") for index, turn in enumerate(turns)]
    if all(message["role"] != "assistant" for message in messages):
        raise BadSample("no assistant turn", f"none of the {len(messages)} turns is the assistant's")
    return messages, {"tools": sample["tools"]} if sample.get("tools") else {}


def render(
    messages: Sequence[Message],
    extra: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
) -> Document:
    """Render a conversation whole with the tokenizer's chat template and mark the assistant's tokens.

    Raises BadSample where the template fails, and with reason UNVERIFIED where it rewrites earlier turns, so that the mask
    cannot be derived.
    """
    arguments = {**extra, **(template_kwargs or {})}
    if tokenizer.is_fast and GENERATION_TAG.search(tokenizer.get_chat_template(tools=extra.get("tools"))):
        return _tagged_document(list(messages), tokenizer, arguments)
    text_of = _template(tokenizer, arguments)
    text, turns = text_of(messages), []
    for index in _replies(messages):
        with_turn, turn = _last_turn(messages[: index + 1], text_of)
        if not text.startswith(with_turn):
            raise BadSample(UNVERIFIED, f"the chat template writes turn {index} differently once later turns follow")
        turns.append(turn)
    return _derived_document(text, turns, tokenizer)


def render_turns(
    messages: Sequence[Message],
    extra: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None,
) -> list[Document]:
    """Render a document per assistant turn: what a server reads and says there, with that turn alone marked.

    Raises BadSample where the template fails or writes a turn otherwise than after its generation prompt.
    """
    text_of = _template(tokenizer, {**extra, **(template_kwargs or {})})
    documents = []
    for index in _replies(messages):
        text, turn = _last_turn(messages[: index + 1], text_of)
        documents.append(_derived_document(text, [turn], tokenizer))
    return documents


def template_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that a reply may hold or end with: those that the chat template writes, and the end of text."""
    template = tokenizer.get_chat_template()
    written = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in template]
    return sorted({*written, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def _read_turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise BadSample("not a conversation", f"{name} is a {type(turn).__name__}, expected an object")
    _refuse_media(turn, name)
    role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
    role = str(turn.get(role_key))
    role = SHAREGPT_ROLES.get(role, role)
    if role not in ROLES:
        known = ", ".join(sorted(ROLES | SHAREGPT_ROLES.keys()))
        raise BadSample("unknown role", f"{name} has role {role!r}, expected one of {known}")
    content = _read_content(turn.get(content_key), name)
    says_something = content.strip() or turn.get("tool_calls") or turn.get("reasoning_content")
    if role in ("user", "assistant") and not says_something:
        raise BadSample("empty turn", f"{name} ({role}) has no content")
    rest = {key: value for key, value in turn.items() if key not in (role_key, content_key)}
    return {"role": role, "content": content, **rest}


def _read_content(content: Any, name: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadSample("content is not text", f"{name} holds a {type(content).__name__}, expected a string")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if any(media in str(kind) for media in ("image", "video", "audio")):
            raise BadSample("has images", f"{name} holds a part of type {kind!r}; only text can be trained on")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadSample("content is not text", f"{name} holds a part of type {kind!r}, expected text parts")
    return "".join(part["text"] for part in content)


def _refuse_media(holder: Mapping[str, Any], name: str) -> None:
    for key in MEDIA_KEYS:
        if holder.get(key):
            raise BadSample("has images", f"{name} has a key {key!r}; only text can be trained on")


def _replies(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _template(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> TextOf:
    """The chat template as a function of messages and whether to add the generation prompt."""

    def text_of(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return on_sample(
            tokenizer.apply_chat_template,
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **arguments,
        )

    return text_of


def _last_turn(messages: Sequence[Message], text_of: TextOf) -> tuple[str, Span]:
    """The text of messages that end with the assistant, and the characters that turn adds to the prompt asking for it."""
    *before, reply = messages
    prompt, text = text_of(before, add_generation_prompt=True), text_of(messages)
    if not text.startswith(prompt) or len(text) == len(prompt):
        raise BadSample(UNVERIFIED, f"the chat template does not write turn {len(before)} after its generation prompt")
    opens_with_reply = text[len(prompt) :].lstrip().startswith(reply["content"].strip())
    if not opens_with_reply and prompt == text_of(before):
        raise BadSample(
            UNVERIFIED,
            f"the chat template has no generation prompt, so the header of turn {len(before)} cannot be told from the reply",
        )
    return text, (len(prompt), len(text))


def _tagged_document(messages: list[Message], tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]) -> Document:
    encoding = on_sample(
        tokenizer.apply_chat_template,
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
        **arguments,
    )
    edges = np.flatnonzero(np.diff(encoding["assistant_masks"], prepend=0, append=0))
    if not edges.size:
        raise BadSample(UNVERIFIED, "the chat template marks no token as the assistant's")
    return _document(encoding["input_ids"], [(int(first), int(end)) for first, end in edges.reshape(-1, 2)])


def _derived_document(text: str, turns: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> Document:
    """A document of which the characters `turns` are the assistant's, up to the end-of-turn token of each."""
    special = tuple(added.content for added in tokenizer.added_tokens_decoder.values() if added.special)
    bounds = []
    for start, stop in turns:
        end = len(text[:stop].rstrip())  # blanks after the end-of-turn token are the template's
        bounds.append((start, end if start < end and text.endswith(special, start, end) else stop))
    return _document(*(_by_offsets if tokenizer.is_fast else _by_prefixes)(text, bounds, tokenizer))


def _by_offsets(text: str, bounds: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """Token ids of `text`, and its `bounds` from characters to tokens; a token across a bound belongs to the turn."""
    encoding = on_sample(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first_T, last_T = np.asarray(encoding["offset_mapping"]).T
    spans = [(np.searchsorted(last_T, start, side="right"), np.searchsorted(first_T, stop)) for start, stop in bounds]
    return encoding["input_ids"], [(int(first), int(end)) for first, end in spans]


def _by_prefixes(text: str, bounds: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """The same for a tokenizer without offsets: the tokens up to a bound, which must be the first of the whole text's."""
    input_ids = _tokens(text, tokenizer)

    def tokens_before(position: int) -> int:
        prefix = _tokens(text[:position], tokenizer)
        if input_ids[: len(prefix)] != prefix:
            raise BadSample(UNVERIFIED, "a token crosses the bound of a turn, and the tokenizer gives no character offsets")
        return len(prefix)

    return input_ids, [(tokens_before(start), tokens_before(stop)) for start, stop in bounds]


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return on_sample(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"]


def _document(input_ids: Sequence[int], spans: Sequence[Span]) -> Document:
    mask = np.zeros(len(input_ids), dtype=bool)
    for first, end in spans:
        mask[first:end] = True
    return Document(np.asarray(input_ids, dtype=np.int32), mask, tuple(end for _, end in spans))


def on_sample(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the template or the tokenizer on a sample; what the sample makes them raise becomes a BadSample."""
    try:
        return call(*args, **kwargs)
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadSample("cannot be rendered", f"{type(error).__name__}: {error}") from error
