"""A tiny byte-level tokenizer, and chat templates of the shapes that real targets have."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from engine.data.documents import Document

TAGGED_CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML = TAGGED_CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_END_TOKEN = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FORGETS_REASONING = CHATML.replace(
    "{{ message['content'] }}<|im_end|>",
    "{% if loop.last and message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message['content'] }}<|im_end|>",
)
# As Qwen3's: earlier turns lose their reasoning, the last one has some, if empty.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set parts = ('\n\n</think>\n\n' + m.content.replace('<think>\n', '')).split('</think>\n\n') %}"
    "{% if loop.last %}<think>\n{{ parts[-2].strip('\n') }}\n</think>\n\n{% endif %}{{ parts[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As GPT-OSS's: earlier turns lose their reasoning and end in another token than the last one.
GPT_OSS = (
    "<|start|>system<|message|>Be exact.<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if loop.last and m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TEMPLATES = {
    "tagged": TAGGED_CHATML,
    "chatml": CHATML,
    "llama3": LLAMA3,
    "no end token": NO_END_TOKEN,
    "forgets reasoning": FORGETS_REASONING,
    "qwen3": QWEN3,
    "gpt-oss": GPT_OSS,
}
SPECIAL_TOKENS = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL_TOKENS += ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
TEXT = "What is a list? A list is a mutable sequence of items. user assistant system Be brief and exact, please.\n\n"


class SlowTokenizer(PreTrainedTokenizer):
    """Characters, and the pair of line breaks as one token; gives no offsets, as tokenizers of remote code."""

    first = 100  # special tokens are numbered from 0

    @property
    def vocab_size(self) -> int:
        return self.first + 0x110000

    def get_vocab(self) -> dict[str, int]:
        return dict(self.added_tokens_encoder)

    def _tokenize(self, text: str) -> list[str]:
        return re.findall(r"\n\n|.", text, re.DOTALL)

    def _convert_token_to_id(self, token: str) -> int:
        return self.first + (0 if token == "\n\n" else ord(token))

    def _convert_id_to_token(self, index: int) -> str:
        return "\n\n" if index == self.first else chr(index - self.first)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    """A byte-level BPE of 340 tokens: single bytes, some words, and the special tokens of all templates."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


@pytest.fixture
def make_tokenizer(backend: Tokenizer) -> Callable[[str], PreTrainedTokenizerFast]:
    """The tokenizer with one of `TEMPLATES`, by name."""

    def make(template: str) -> PreTrainedTokenizerFast:
        # As in Llama-3 and Qwen checkpoints, most special tokens have no name such as eos.
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|begin|>", chat_template=TEMPLATES[template], model_max_length=64
        )

    return make


@pytest.fixture
def make_slow_tokenizer() -> Callable[[str], SlowTokenizer]:
    """A tokenizer without offsets with one of `TEMPLATES`, by name."""

    def make(template: str) -> SlowTokenizer:
        tokenizer = SlowTokenizer(bos_token="<|begin|>", chat_template=TEMPLATES[template])
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
        return tokenizer

    return make


@pytest.fixture
def make_document() -> Callable[..., Document]:
    """A document of given turn lengths, prompt and reply in turn; its tokens are `first`, `first + 1`, ..."""

    def make(*turns: int, first: int = 0) -> Document:
        ends = np.cumsum(turns)
        mask = np.concatenate([np.full(length, bool(index % 2)) for index, length in enumerate(turns)])
        ids = np.arange(first, first + ends[-1], dtype=np.int32)
        return Document(ids, mask, tuple(int(end) for end in ends[1::2]))

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write samples (objects, or raw lines as bytes) to a file and return its path."""

    def write(*samples: dict | bytes, name: str = "chats.jsonl") -> str:
        lines = [sample if isinstance(sample, bytes) else json.dumps(sample).encode() for sample in samples]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return str(tmp_path / name)

    return write
