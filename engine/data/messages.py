"""What a line of a conversation file says: its messages, or why it cannot be used."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2

ROLES = {"user", "assistant", "system", "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")

Message = dict[str, Any]


class BadSample(ValueError):
    """A conversation that cannot be used: `reason` is the category it is counted under, `detail` says what came."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def parse(line: bytes) -> Any:
    """The JSON of a line. Raises BadSample."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("not UTF-8", f"byte {error.start} of the line; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadSample("not JSON", f"expected one JSON object on the line: {error}") from error


def written_text(sample: Any) -> str | None:
    """The text of a sample that was written with the chat template already; None if it is of messages."""
    text = sample.get("text") if isinstance(sample, dict) and "conversations" not in sample else None
    return text if isinstance(text, str) else None


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


def on_sample(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the template or the tokenizer on a sample; what the sample makes them raise becomes a BadSample."""
    try:
        return call(*args, **kwargs)
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadSample("cannot be rendered", f"{type(error).__name__}: {error}") from error


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
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise BadSample("not UTF-8", f"{name} holds half of a surrogate pair, which no text has") from error
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
