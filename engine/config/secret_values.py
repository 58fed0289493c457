"""Secrets, such as API keys and passwords in addresses, hidden in everything that is written or shown."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<hidden>"
# Names of options that hold a secret. Token counts and token ids, which end alike, are no secrets.
SECRET_NAME = re.compile(
    r"(^|[._-])(api_?key|access_?key|private_?key|secret(_?key)?|passw(or)?d|credentials?"
    r"|((api|access|auth|hub|hf|bearer)_?)token)$",
    re.IGNORECASE,
)
USER_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+@")
SECRET_IN_QUERY = re.compile(r"([?&](?:api_?key|access_?key|(?:\w*_)?token|secret|password)=)[^&#\s]+", re.IGNORECASE)
BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/-]{8,}", re.IGNORECASE)
# Keys by their published forms: Hugging Face's have 30 letters and digits or more, OpenAI's mix digits and both cases. Names of
# files and folders that begin alike, such as hf_datasets_2025, are no keys.
KNOWN_KEYS = re.compile(r"\b(hf_(?=[A-Za-z0-9]{30})|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])(?=[\w-]*[a-z])(?=[\w-]{20}))[\w-]+")


def is_secret_name(name: str) -> bool:
    """Whether an option of this name, sections included, holds a secret."""
    return SECRET_NAME.search(name) is not None


def without_secrets(value: Any) -> Any:
    """Return a value of plain containers in which secrets, found by their key or their form, are replaced."""
    if isinstance(value, Mapping):
        return {key: _entry(key, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(without_secrets(inner) for inner in value)
    return hidden_in_text(value) if isinstance(value, str) else value


def hidden_in_text(text: str, *secrets: str | None) -> str:
    """Return a text without the secrets that can be told by their form, and without those given."""
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
