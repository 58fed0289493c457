"""Convert messages to the form that a chat template accepts: developer role, tool call arguments.

The form is found by rendering short conversations with known words, once per template.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from engine.data.messages import BadSample, Message, with_text_arguments
from engine.data.reply_shape import NEXT, QUESTION, WORDS
from engine.data.templates import ChatTemplate

DEVELOPER_AS_SYSTEM = "role developer, which the chat template does not have, written as system"
ORDER = "Answer briefly, as ordered."
ARGUMENTS = {"query": "green tea"}
# Mistral's templates accept only ids of nine letters and digits.
CALL = {"id": "call00001", "type": "function", "function": {"name": "search", "arguments": ARGUMENTS}}
RESULT = {"role": "tool", "name": "search", "tool_call_id": CALL["id"], "content": "Found."}

ArgumentForm = Literal["object", "text"]


def accepted_roles(messages: Sequence[Message], template: ChatTemplate) -> list[Message]:
    """Return the messages, with role developer renamed to system if the template lacks it."""
    if all(message["role"] != "developer" for message in messages) or takes_developer(template):
        return list(messages)
    renamed = []
    for message in messages:
        is_developer = message["role"] == "developer"
        renamed.append(message | {"role": "system"} if is_developer else message)
    return renamed


def accepted_arguments(messages: Sequence[Message], template: ChatTemplate) -> list[list[Message]]:
    """Return the messages with the arguments of tool calls in the form that the template accepts.

    The result is a list of alternatives. It has two entries, the more usual form first, if the
    accepted form cannot be determined.
    """
    if not any(message.get("tool_calls") for message in messages):
        return [list(messages)]
    form = argument_form(template)
    if form == "object":
        return [list(messages)]
    if form == "text":
        return [with_text_arguments(messages)]
    return [list(messages), with_text_arguments(messages)]


def takes_developer(template: ChatTemplate) -> bool:
    """Return whether the template writes the role developer differently from user and assistant."""
    return _takes_developer(template.tokenizer, template.source, _probe_arguments(template))


def argument_form(template: ChatTemplate) -> ArgumentForm | None:
    """Return the form of tool call arguments that the template accepts: "object" or "text".

    Returns None if it fails with both.
    """
    return _argument_form(template.tokenizer, template.source, _probe_arguments(template))


def _probe_arguments(template: ChatTemplate) -> str:
    return template.probe_arguments(with_tool=bool(template.arguments.get("tools")))


def _rendered(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    """Return the rendered messages, or None if the template cannot write them."""
    try:
        return template.text(messages)
    except BadSample:
        return None


@lru_cache(maxsize=64)
def _takes_developer(tokenizer: PreTrainedTokenizerBase, source: str, arguments: str) -> bool:
    template = ChatTemplate(tokenizer, json.loads(arguments), source)
    question = {"role": "user", "content": QUESTION}

    def ordered_by(role: str) -> str | None:
        return _rendered(template, [{"role": role, "content": ORDER}, question])

    text = ordered_by("developer")
    return text is not None and ORDER in text and text not in (ordered_by("user"), ordered_by("assistant"))


@lru_cache(maxsize=64)
def _argument_form(tokenizer: PreTrainedTokenizerBase, source: str, arguments: str) -> ArgumentForm | None:
    template = ChatTemplate(tokenizer, json.loads(arguments), source)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        RESULT,
        {"role": "assistant", "content": WORDS},
        {"role": "user", "content": NEXT},
    ]
    as_objects = _rendered(template, messages)
    # The text of a Python dict is not JSON.
    if as_objects is not None and str(ARGUMENTS) not in as_objects:
        return "object"
    if _rendered(template, with_text_arguments(messages)) is not None:
        return "text"
    return None if as_objects is None else "object"
