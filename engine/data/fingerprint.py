"""Short hashes by which two runs can tell that they read the same: tokenizer, template, configuration."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase


def hash_of(value: object) -> str:
    """The first 16 digits of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what decides the ids of a text."""
    if tokenizer.is_fast:
        return hash_of(json.loads(tokenizer.backend_tokenizer.to_str()))
    return hash_of([type(tokenizer).__name__, tokenizer.get_vocab()])
