"""A target of a few thousand weights with its tokenizer and chat template, and conversations it can read; all from seeds."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<unk>", "<user>", "<assistant>", "<end>", *(f"w{index}" for index in range(60))]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} <end> {% endgeneration %}{% else %}{{ m['content'] }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAYERS = 5
HIDDEN = 16
AUX_LAYERS = (0, 1, 3)


class TinyCorpus(NamedTuple):
    """Paths of two JSONL files of conversations."""

    train: str
    held_out: str


def write_target(folder: Path) -> Path:
    """Write a random Llama of 5 layers and width 16, a tokenizer of 64 words and a chat template; returns the folder."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(
        **shape,
        vocab_size=len(WORDS),
        num_hidden_layers=LAYERS,
        bos_token_id=None,
        eos_token_id=3,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def write_corpus(folder: Path) -> TinyCorpus:
    """Write forty conversations to train on and four held out."""
    generator = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{generator.randrange(60)}" for _ in range(count))

    def write(name: str, count: int) -> str:
        turns = [[("user", words(3)), ("assistant", words(8))] for _ in range(count)]
        samples = [{"conversations": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
        (folder / name).write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
        return str(folder / name)

    return TinyCorpus(write("train.jsonl", 40), write("held_out.jsonl", 4))
