"""A conversation becomes token ids and the mask of what the assistant said.

The tokenizer's chat template writes the text. Which tokens are the assistant's is read from the template's
`{% generation %}` tags; a template without them is rendered once per prefix of the conversation, and the text that a turn
adds after its generation prompt is the turn. Both cover a reply and its end-of-turn token, not the template around them.
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

Message = dict[str, Any]
Span = tuple[int, int]


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
    """Render a conversation with the tokenizer's chat template and mark the assistant's tokens.

    Raises BadSample where the template fails, or where it rewrites earlier turns so that the mask cannot be derived.
    """
    arguments = {**extra, **(template_kwargs or {})}
    has_tags = GENERATION_TAG.search(tokenizer.get_chat_template(tools=extra.get("tools")))
    input_ids, spans = (_tagged_turns if has_tags else _derived_turns)(list(messages), tokenizer, arguments)
    if not spans:
        raise BadSample("mask cannot be verified", "the chat template marks no token as the assistant's")
    mask = np.zeros(len(input_ids), dtype=bool)
    for first, end in spans:
        mask[first:end] = True
    return Document(np.asarray(input_ids, dtype=np.int32), mask, tuple(end for _, end in spans))


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


def _tagged_turns(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]
) -> tuple[list[int], list[Span]]:
    encoding = _render(
        tokenizer.apply_chat_template,
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
        **arguments,
    )
    edges = np.flatnonzero(np.diff(encoding["assistant_masks"], prepend=0, append=0))
    return encoding["input_ids"], [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def _derived_turns(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]
) -> tuple[list[int], list[Span]]:
    def text_of(prefix: list[Message], **kwargs: Any) -> str:
        return _render(tokenizer.apply_chat_template, prefix, tokenize=False, **kwargs, **arguments)

    text = text_of(messages)
    turns = [_turn_in_text(text, messages, index, text_of) for index, m in enumerate(messages) if m["role"] == "assistant"]
    encoding = _render(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    input_ids, offsets = encoding["input_ids"], np.asarray(encoding["offset_mapping"])
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    spans = []
    for start, stop in turns:
        first = int(np.searchsorted(offsets[:, 1], start, side="right"))
        end = int(np.searchsorted(offsets[:, 0], stop, side="left"))
        last_special = max((index for index in range(first, end) if input_ids[index] in special), default=None)
        if last_special is not None and not text[offsets[last_special, 1] : stop].strip():
            end = last_special + 1  # blanks after the end-of-turn token are the template's
        spans.append((first, end))
    return input_ids, spans


def _turn_in_text(text: str, messages: list[Message], index: int, text_of: Callable[..., str]) -> Span:
    """Characters that assistant turn `index` occupies in `text`: what it adds to the prompt that asks for it."""
    before = messages[:index]
    prompt, with_turn = text_of(before, add_generation_prompt=True), text_of(messages[: index + 1])
    if not (with_turn.startswith(prompt) and text.startswith(with_turn) and len(prompt) < len(with_turn)):
        raise BadSample(
            "mask cannot be verified",
            f"the chat template writes turn {index} differently once later turns follow, or not after its generation prompt",
        )
    opens_with_reply = with_turn[len(prompt) :].lstrip().startswith(messages[index]["content"].strip())
    if not opens_with_reply and prompt == text_of(before):
        raise BadSample(
            "mask cannot be verified",
            f"the chat template has no generation prompt, so the header of turn {index} cannot be told from the reply",
        )
    return len(prompt), len(with_turn)


def _render(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the template or the tokenizer on a sample; what the sample makes them raise becomes a BadSample."""
    try:
        return call(*args, **kwargs)
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadSample("cannot be rendered", f"{type(error).__name__}: {error}") from error
