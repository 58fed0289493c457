"""Functions that hide secrets, such as API keys and passwords in URLs, in all output."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<hidden>"
# Names of options that hold a secret. Token counts and token ids have similar names and are not
# secrets.
SECRET_NAME = re.compile(
    r"(^|[._-])(api_?key|access_?key|private_?key|secret(_?key)?|passw(or)?d|credentials?"
    r"|((api|access|auth|hub|hf|bearer)_?)token)$",
    re.IGNORECASE,
)
USER_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+@")
SECRET_IN_QUERY = re.compile(r"([?&](?:api_?key|access_?key|(?:\w*_)?token|secret|password)=)[^&#\s]+", re.IGNORECASE)
BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/-]{8,}", re.IGNORECASE)
# Published formats of keys: Hugging Face's have at least 30 letters and digits, OpenAI's mix digits
# and both cases. Names of files and folders with the same prefix, such as hf_datasets_2025, are not
# keys.
KNOWN_KEYS = re.compile(r"\b(hf_(?=[A-Za-z0-9]{30})|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])(?=[\w-]*[a-z])(?=[\w-]{20}))[\w-]+")


def is_secret_name(name: str) -> bool:
    """Return whether an option with this name, with or without its section, holds a secret."""
    return SECRET_NAME.search(name) is not None


def without_secrets(value: Any) -> Any:
    """Return a copy of nested plain containers with secrets hidden, found by key or by format."""
    if isinstance(value, Mapping):
        return {key: _entry(key, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(without_secrets(inner) for inner in value)
    return hidden_in_text(value) if isinstance(value, str) else value


def hidden_in_text(text: str, *secrets: str | None) -> str:
    """Return the text with `secrets`, and secrets recognised by their format, hidden."""
    for secret in secrets:
        if secret and len(secret) >= 6:  # a shorter one would hide parts of words
            text = text.replace(secret, HIDDEN)
    text = USER_IN_ADDRESS.sub(f"{HIDDEN}@", text)
    text = SECRET_IN_QUERY.sub(rf"\g<1>{HIDDEN}", text)
    text = BEARER.sub(rf"\g<1>{HIDDEN}", text)
    return KNOWN_KEYS.sub(rf"\g<1>{HIDDEN}", text)


def _entry(key: Any, value: Any) -> Any:
    if is_secret_name(str(key)) and value not in (None, ""):
        return HIDDEN
    return without_secrets(value)
