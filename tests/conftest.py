"""A target of a few thousand weights with its tokenizer and chat template, and conversations it can read; all from seeds."""

import json
import os
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined, so before Transformers imports Triton

# Commands that the tests start keep tokenised conversations here, not in the user's cache; modules copy the environment early.
CACHE = tempfile.TemporaryDirectory(prefix="draftspeed-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.paths import PATHS, ComputePath

WORDS = ["<unk>", "<user>", "<assistant>", "<end>", *(f"w{index}" for index in range(60))]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} <end> {% endgeneration %}{% else %}{{ m['content'] }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAYERS, HIDDEN, AUX_LAYERS = 5, 16, (0, 1, 3)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> ComputePath:
    """One way to compute a training-time test; on a CPU plain PyTorch takes flash attention's place."""
    chosen = PATHS[request.param]
    if chosen.needs_gpu and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: Triton cannot interpret liger-kernel's norms")
    if chosen.needs_triton or chosen.needs_gpu:
        pytest.importorskip("triton", reason="Triton is not installed")
        from engine.kernels import flash
        from tests.kernels.plain_flash import PLAIN

        monkeypatch.setattr(flash, "available_flash", lambda: PLAIN)
    return chosen


class TinyCorpus(NamedTuple):
    """Paths of two JSONL files of conversations."""

    train: str
    held_out: str


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory) -> Path:
    """A Hugging Face folder: a random Llama of 5 layers and width 16, a tokenizer of 64 words, a chat template."""
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        **shape, vocab_size=len(WORDS), num_hidden_layers=LAYERS, bos_token_id=None, eos_token_id=3, initializer_range=0.3
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> TinyCorpus:
    """Forty conversations to train on and four held out."""
    folder, generator = tmp_path_factory.mktemp("corpus"), random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{generator.randrange(60)}" for _ in range(count))

    def write(name: str, count: int) -> str:
        turns = [[("user", words(3)), ("assistant", words(8))] for _ in range(count)]
        samples = [{"conversations": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
        (folder / name).write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
        return str(folder / name)

    return TinyCorpus(write("train.jsonl", 40), write("held_out.jsonl", 4))
