"""Short hashes by which two runs can tell that they read the same: conversations, tokenizer, template, configuration."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase

from engine.config.sections import DataSection


def hash_of(value: object) -> str:
    """The first 16 digits of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def trained_with(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> dict[str, str]:
    """What the texts that a draft learns from depend on, beside the conversations: serving must match it."""
    template = hash_of([tokenizer.chat_template, data.template_kwargs, data.turns])
    return {"tokenizer_hash": tokenizer_hash(tokenizer), "template_hash": template}


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what decides the ids of a text."""
    if tokenizer.is_fast:
        return hash_of(json.loads(tokenizer.backend_tokenizer.to_str()))
    return hash_of([type(tokenizer).__name__, tokenizer.get_vocab()])
