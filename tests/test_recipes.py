"""Every recipe loads, and the draft it describes has the shape its target asks for."""

from pathlib import Path

import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config.recipe import load_config
from engine.config.sections import EMBEDDED
from engine.models.eagle3.draft_config import Eagle3Config, derive_draft_config
from engine.models.method_registry import make_method
from engine.models.target_families import default_aux_layers, text_config
from tests.recipes_configs import RECIPES, target_config

FOLDER = Path(__file__).parents[1] / "launcher" / "recipes"
LLAMA3 = {"rope_type": "llama3", "original_max_position_embeddings": 8192, "low_freq_factor": 1.0}
LLAMA31 = LLAMA3 | {"rope_theta": 500000.0, "factor": 8.0, "high_freq_factor": 4.0}
GPT_OSS = {
    "rope_type": "yarn",
    "rope_theta": 150000,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
QWEN3 = {"rope_type": "default", "rope_theta": 1000000.0}
DEEPSEEK = {"rope_type": "yarn", "original_max_position_embeddings": 4096, "beta_slow": 1}

# recipe -> aux layers; hidden, MLP width, heads, key/value heads, head dim; vocabulary, max positions; RoPE
EXPECTED = {
    "llama3.1-8b": ((1, 15, 28), (4096, 14336, 32, 8, 128), (128256, 131072), LLAMA31),
    "llama3.3-70b": ((1, 39, 76), (8192, 28672, 64, 8, 128), (128256, 131072), LLAMA31),
    "llama4-scout": (
        (1, 23, 44),
        (5120, 16384, 40, 8, 128),
        (202048, 10485760),
        LLAMA3 | {"rope_theta": 500000.0, "factor": 16.0, "high_freq_factor": 1.0},
    ),
    "llama4-maverick": (
        (1, 23, 44),
        (5120, 16384, 40, 8, 128),
        (202048, 1048576),
        {"rope_type": "default", "rope_theta": 500000.0},
    ),
    "qwen3-8b": ((1, 17, 32), (4096, 12288, 32, 8, 128), (151936, 40960), QWEN3),
    "qwen3-30b-a3b": ((1, 23, 44), (2048, 6144, 32, 4, 128), (151936, 40960), QWEN3),
    "qwen3-235b-a22b": ((1, 46, 90), (4096, 12288, 64, 4, 128), (151936, 40960), QWEN3),
    "gpt-oss-20b": ((1, 11, 20), (2880, 10240, 64, 8, 64), (201088, 131072), GPT_OSS),
    "gpt-oss-120b": ((1, 17, 32), (2880, 10240, 64, 8, 64), (201088, 131072), GPT_OSS),
    "deepseek-v3": (
        (1, 29, 57),
        (7168, 18432, 64, 8, 128),
        (129280, 163840),
        DEEPSEEK | {"rope_theta": 10000, "factor": 40, "beta_fast": 32},
    ),
    "kimi-k2": (
        (1, 29, 57),
        (7168, 18432, 64, 8, 128),
        (163840, 131072),
        DEEPSEEK | {"rope_theta": 50000.0, "factor": 32.0, "beta_fast": 1.0},
    ),
}
EMBEDDED_RECIPES = ("embedded", "embedded-dflash", "embedded-dflash2", "embedded-dspark")
# recipe -> recipe of the same target; draft layers, target layers that are read
OF_BLOCKS = {
    "qwen3-8b-dflash": ("qwen3-8b", 5, (1, 9, 17, 25, 33)),
    "qwen3-8b-dflash2": ("qwen3-8b", 5, (1, 9, 17, 25, 33)),
    "qwen3-8b-dspark": ("qwen3-8b", 5, (1, 9, 17, 25, 33)),
}


def _draft(recipe: str) -> Eagle3Config:
    config = load_config(FOLDER / f"{recipe}.yaml", [])
    return derive_draft_config(target_config(recipe), config.draft, config.target.aux_layers)


def test_every_recipe_has_its_targets_published_config():
    assert {path.stem for path in FOLDER.glob("*.yaml")} - {*EMBEDDED_RECIPES, *OF_BLOCKS} == set(RECIPES) == set(EXPECTED)


@pytest.mark.parametrize("recipe", EMBEDDED_RECIPES)
def test_the_embedded_recipe_needs_nothing_from_outside(recipe):
    config = load_config(FOLDER / f"{recipe}.yaml", [])
    assert (config.target.path, config.data.train, config.data.held_out) == (EMBEDDED, (EMBEDDED,), (EMBEDDED,))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_what_it_is_and_how_to_run_it(recipe):
    title = (FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[1]
    assert title.startswith("# A draft for ")
    assert title.endswith(f"--recipe launcher/recipes/{recipe}.yaml")
    assert load_config(FOLDER / f"{recipe}.yaml", []).output_dir == f"outputs/{recipe}"


@pytest.mark.parametrize("recipe", OF_BLOCKS)
def test_a_block_drafter_has_the_shape_of_its_target_and_drafts_whole_blocks(recipe):
    target_recipe, num_layers, layers = OF_BLOCKS[recipe]
    config = load_config(FOLDER / f"{recipe}.yaml", [])
    title = (FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[2]
    assert title.endswith(f"--ds_config ds_configs/zero2_block.json --recipe launcher/recipes/{recipe}.yaml")
    assert config.output_dir == f"outputs/{recipe}"
    method = make_method(config)
    draft = method.derive_config(target_config(target_recipe), config.target.aux_layers)
    _, shape, (vocab_size, positions), rope = EXPECTED[target_recipe]
    assert draft.aux_layers == layers
    heads = (draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim)
    assert (draft.hidden_size, draft.intermediate_size, *heads) == shape
    assert (draft.vocab_size, draft.max_position_embeddings) == (vocab_size, positions)
    assert draft.rope_parameters == rope
    assert draft.num_hidden_layers == num_layers
    assert config.evaluation.num_steps == draft.num_predictions


# Recipes whose targets leave no room for 16,384 tokens on as many GPUs as hold one copy.
LESS_TOKENS = {"llama3.3-70b": 8192, "deepseek-v3": 8192, "llama4-scout": 4096, "llama4-maverick": 4096}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_micro_batch_is_large_enough_for_a_gpu(recipe):
    config = load_config(FOLDER / f"{recipe}.yaml", [])
    assert config.data.max_tokens == LESS_TOKENS.get(recipe, 16384)


@pytest.mark.parametrize("recipe", RECIPES)
def test_draft_has_the_shape_of_its_target(recipe):
    layers, shape, (vocab_size, positions), rope = EXPECTED[recipe]
    draft = _draft(recipe)
    assert draft.aux_layers == layers
    heads = (draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim)
    assert (draft.hidden_size, draft.intermediate_size, *heads) == shape
    assert (draft.vocab_size, draft.max_position_embeddings) == (vocab_size, positions)
    assert draft.rope_parameters == rope
    assert (draft.draft_vocab_size, draft.num_hidden_layers, draft.target_hidden_size) == (32000, 1, shape[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_names_the_layers_of_the_default_rule(recipe):
    layers = load_config(FOLDER / f"{recipe}.yaml", []).target.aux_layers
    assert layers == default_aux_layers(text_config(target_config(recipe)).num_hidden_layers)


@pytest.mark.parametrize("recipe", RECIPES)
def test_draft_turns_by_its_targets_frequencies(recipe):
    draft = _draft(recipe)
    target = text_config(target_config(recipe))
    exported = LlamaConfig(**draft.to_dict())
    rotary = LlamaRotaryEmbedding(exported)
    assert rotary.inv_freq.shape == (draft.head_dim // 2,)
    as_target = LlamaConfig(**draft.to_dict() | {"rope_scaling": None, "rope_parameters": dict(target.rope_parameters)})
    assert rotary.inv_freq.equal(LlamaRotaryEmbedding(as_target).inv_freq)
