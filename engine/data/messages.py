"""Parse lines of conversation files into messages, or refuse them with a reason."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

ROLES = {"user", "assistant", "system", "developer", "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
OPEN = "<think>"
CLOSE = "</think>"

# Errors of a template that uses up numbers, the stack or the memory.
EXHAUSTION = (OverflowError, RecursionError, MemoryError)

Message = dict[str, Any]


class BadSample(ValueError):
    """A conversation that cannot be used.

    reason: category under which it is counted.
    detail: description of the problem.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def parse(line: bytes) -> Any:
    """Return the JSON value of a line. Raises BadSample if it is not JSON in UTF-8."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("not UTF-8", f"byte {error.start} of the line; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadSample("not JSON", f"expected one JSON object on the line: {error}") from error


def parse_text(value: Any, name: str) -> Any:
    """Parse `value` if it is JSON text; return None for blank text, and other values unchanged.

    Some data sets store tools and calls as JSON text, because their format needs one type per
    column.
    Raises BadSample if the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadSample("not JSON", f"{name} is text, expected JSON: {error}") from error


def written_text(sample: Any) -> str | None:
    """Return the text of a sample that is already rendered; None if the sample has messages."""
    text = sample.get("text") if isinstance(sample, dict) and "conversations" not in sample else None
    return text if isinstance(text, str) else None


def read_messages(sample: Any) -> tuple[list[Message], dict[str, Any]]:
    """Return the messages and the template arguments (`tools`) of a JSON sample.

    Messages have a role, a content, and all other keys unchanged. Both `role`/`content` and
    ShareGPT's `from`/`value` are accepted. Tools, tool calls and the arguments of calls may be JSON
    text; they are converted to objects, which chat templates expect. A call without arguments gets
    an empty object. `reasoning`, the name that some servers use, is kept and also copied to
    `reasoning_content`, which most templates read.
    Raises BadSample if the sample cannot be used.
    """
    turns = sample.get("conversations") if isinstance(sample, dict) else None
    if not isinstance(turns, list):
        raise BadSample("not a conversation", "expected an object whose key 'conversations' holds a list of turns")
    _refuse_media(sample, "the sample")
    messages = [_read_turn(turn, f"turn {index}") for index, turn in enumerate(turns)]
    if sample.get("system") and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": _read_content(sample["system"], "the key 'system'")})
    if all(message["role"] != "assistant" for message in messages):
        raise BadSample("no assistant turn", f"none of the {len(messages)} turns is the assistant's")
    tools = _read_tools(sample.get("tools"))
    return messages, {"tools": tools} if tools else {}


def thinking_and_words(reply: Message) -> tuple[str, str]:
    """Return the thinking of a reply and its content without the thinking.

    The thinking is in one of REASONING_KEYS, or in a thinking block at the start of the content.
    """
    content = reply["content"].strip()
    for key in REASONING_KEYS:
        if reply.get(key):
            return reply[key], content
    thinking, closed, words = content.partition(CLOSE)
    if closed and (content.startswith(OPEN) or (OPEN not in content and words.startswith("\n"))):
        return thinking.removeprefix(OPEN), words.strip()
    return "", content


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Return messages with tool call arguments as JSON text, which a few templates need."""

    def as_text(arguments: Any) -> str:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    return [
        message | {"tool_calls": [with_arguments(call, as_text) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def with_arguments(call: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a tool call with `change` applied to its arguments; missing arguments count as {}.

    call: an object with the key `function`, or the function object itself.
    """
    function = call.get("function", call)
    arguments = function.get("arguments")
    function = function | {"arguments": change({} if arguments is None else arguments)}
    return call | {"function": function} if "function" in call else function


def as_object(arguments: Any) -> Any:
    """Return the arguments of a tool call as an object, which chat templates expect.

    Arguments that are not a JSON object are returned unchanged: a model may generate invalid JSON.
    """
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def on_sample(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the template or the tokenizer on a sample. Raises BadSample if the call fails."""
    try:
        return call(*args, **kwargs)
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, *EXHAUSTION) as error:
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
    rest = {key: value for key, value in turn.items() if key not in (role_key, content_key)}
    if rest.get("tool_calls"):
        rest["tool_calls"] = _read_calls(rest["tool_calls"], name)
    _read_reasoning(rest, name)
    says_something = content.strip() or rest.get("tool_calls") or any(rest.get(key) for key in REASONING_KEYS)
    if role in ("user", "assistant") and not says_something:
        raise BadSample("empty turn", f"{name} ({role}) has no content")
    return {"role": role, "content": content, **rest}


def _read_reasoning(turn: dict[str, Any], name: str) -> None:
    """Copy `reasoning` to `reasoning_content`, in place.

    Raises BadSample if reasoning is not text, or if the two keys hold different texts.
    """
    for key in REASONING_KEYS:
        if turn.get(key) is not None and not isinstance(turn[key], str):
            problem = f"{name} holds a {type(turn[key]).__name__} under {key!r}, expected a string"
            raise BadSample("content is not text", problem)
    reasoning = turn.get("reasoning")
    if not reasoning:
        return
    if turn.get("reasoning_content") not in (None, "", reasoning):
        problem = f"{name} holds different texts under 'reasoning' and 'reasoning_content'; keep one"
        raise BadSample("contradictory reasoning", problem)
    turn["reasoning_content"] = reasoning


def _read_tools(tools: Any) -> list[Any]:
    tools = parse_text(tools, "tools")
    if not tools:
        return []
    if not isinstance(tools, list):
        raise BadSample("malformed tools", f"expected a list of tools under 'tools', got {tools!r:.100}")
    return [parse_text(tool, "a tool") for tool in tools]


def _read_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    problem = f"{name}: expected a list of {{'function': {{'name': str, 'arguments': object}}}}, got {calls!r:.100}"
    try:
        calls = parse_text(calls, "tool_calls") or []
    except BadSample as error:
        raise BadSample("malformed tool call", problem) from error
    if not isinstance(calls, list):
        raise BadSample("malformed tool call", problem)
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadSample("malformed tool call", problem)
        read.append(with_arguments(call, as_object))
    return read


def _read_content(content: Any, name: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise BadSample("not UTF-8", f"{name} holds half of a surrogate pair, which is not valid text") from error
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
