"""Short hashes of tokenizer, template and configuration, to check that two runs agree on them."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase

from engine.config.sections import DataSection


def hash_of(value: object) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def trained_with(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> dict[str, str]:
    """Return the hashes of the tokenizer and the template settings that a draft is trained with.

    Serving must use the same ones.
    """
    template = hash_of([tokenizer.chat_template, data.template_kwargs, data.turns])
    return {"tokenizer_hash": tokenizer_hash(tokenizer), "template_hash": template}


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything in the tokenizer that determines the token ids of a text."""
    if tokenizer.is_fast:
        return hash_of(json.loads(tokenizer.backend_tokenizer.to_str()))
    return hash_of([type(tokenizer).__name__, tokenizer.get_vocab()])
