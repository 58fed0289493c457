"""The draft's shape: what follows from the target, what a recipe overrides, and what config.json says of it."""

import dataclasses
import json

import pytest
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from engine.config.sections import DraftSection
from engine.models.eagle3.draft_config import Eagle3Config, derive_draft_config
from tests.parallel.families import tiny_config

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
U32000 = DraftSection(vocab_size=32000)


def _llama31(**changes) -> LlamaConfig:
    values = dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=dict(LLAMA31_ROPE),
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    )
    return LlamaConfig(**values | changes)


def _written(tmp_path, exported: dict) -> DraftSection:
    path = tmp_path / "draft.json"
    path.write_text(json.dumps(exported))
    return DraftSection(config=str(path))


def test_exported_config_of_llama31_is_what_servers_read():
    assert derive_draft_config(_llama31(), U32000).to_dict() == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "draft_vocab_size": 32000,
        "dtype": "bfloat16",
        "eagle_aux_hidden_state_layer_ids": [2, 16, 29],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 15, 28], "use_aux_hidden_state": True},
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 1,
        "num_key_value_heads": 8,
        "pad_token_id": None,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA31_ROPE | {"rope_theta": 500000.0},
        "rope_scaling": LLAMA31_ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }


@pytest.mark.parametrize(
    "draft",
    [
        U32000,
        DraftSection(fc_norm=True, norm_output=True, num_layers=3),
        DraftSection(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=2),
    ],
)
def test_exported_config_reads_back_as_it_was(draft):
    config = derive_draft_config(_llama31(), draft, (2, 16, 29))
    exported = json.loads(json.dumps(config.to_dict()))
    assert list(exported) == sorted(exported)
    assert Eagle3Config.from_dict(exported) == config


def test_options_of_eagle_31_and_a_narrower_draft_are_exported_only_where_used():
    plain = derive_draft_config(_llama31(), U32000).to_dict()
    assert not {"fc_norm", "norm_output", "target_hidden_size"} & set(plain)
    wide = derive_draft_config(_llama31(), DraftSection(hidden_size=2048, fc_norm=True, norm_output=True)).to_dict()
    assert (wide["fc_norm"], wide["norm_output"], wide["target_hidden_size"]) == (True, True, 4096)


def test_every_shape_can_be_overridden():
    draft = DraftSection(
        vocab_size=100, num_layers=2, hidden_size=512, intermediate_size=640, num_attention_heads=6, num_key_value_heads=3
    )
    config = derive_draft_config(_llama31(), draft, (4, 5, 6))
    assert (config.draft_vocab_size, config.num_hidden_layers, config.hidden_size) == (100, 2, 512)
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (640, 6, 3)
    assert (config.target_hidden_size, config.head_dim, config.aux_layers) == (4096, 128, (4, 5, 6))


def test_wrappers_give_their_texts_shape_and_rope_is_that_of_full_attention():
    text = Gemma3TextConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=96,
        num_hidden_layers=8,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    config = derive_draft_config(Gemma3Config(text_config=text.to_dict()), DraftSection())
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (256, 1024, 96)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert config.hidden_act == "silu"


@pytest.mark.parametrize(
    "target",
    [
        GlmConfig(partial_rotary_factor=0.5, rope_theta=5e5),
        Qwen2_5_VLConfig(
            text_config=dict(rope_parameters=dict(rope_type="default", rope_theta=5e5, mrope_section=[16, 24, 24]))
        ),
        Qwen2_5_VLConfig(text_config=dict(rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), rope_theta=5e5)),
    ],
)
def test_partial_and_multimodal_rope_become_the_plain_one(target):
    assert derive_draft_config(target, DraftSection()).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_a_target_without_rope_gets_the_plain_one():
    config = derive_draft_config(GPT2Config(), DraftSection())
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.hidden_size, config.num_attention_heads, config.max_position_embeddings) == (768, 12, 1024)


def test_yarn_is_kept_without_the_keys_that_servers_read_differently():
    yarn = dict(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=1024,
        beta_fast=16,
        mscale=1.0,
        mscale_all_dim=1.0,
        attention_factor=1.0,
    )
    target = Qwen3Config(rope_parameters=yarn | {"rope_theta": 1e6}, max_position_embeddings=4096)
    kept = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=1024, beta_fast=16)
    assert derive_draft_config(target, DraftSection()).rope_parameters == kept


@pytest.mark.parametrize(
    "target",
    [
        LlamaConfig(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
        Phi3Config(
            rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 48, long_factor=[2.0] * 48),
            original_max_position_embeddings=4096,
            max_position_embeddings=131072,
        ),
    ],
)
def test_rope_that_depends_on_length_is_refused_by_name(target):
    kind = target.rope_parameters["rope_type"]
    with pytest.raises(ValueError, match=f"{target.model_type}.*{kind}.*draft.config"):
        derive_draft_config(target, DraftSection())


def test_heads_that_differ_from_layer_to_layer_are_refused_by_name():
    with pytest.raises(ValueError, match="gemma4_unified_text.*in different layers.*give draft.config"):
        derive_draft_config(tiny_config("gemma4_unified_text"), DraftSection(), (0, 1, 2))


def test_of_several_ropes_a_draft_has_that_of_the_main_attention():
    target = tiny_config("deepseek_v4")
    rope = derive_draft_config(target, DraftSection(vocab_size=32), (0, 1, 2)).rope_parameters
    assert rope["rope_theta"] == target.rope_parameters["main"]["rope_theta"] and rope["rope_type"] == "default"


@pytest.mark.parametrize("hidden_size, heads, groups", [(7168, 64, 8), (4096, 32, 8), (512, 4, 4), (96, 1, 1)])
def test_latent_attention_gives_heads_that_powers_of_two_divide(hidden_size, heads, groups):
    config = derive_draft_config(DeepseekV3Config(hidden_size=hidden_size), DraftSection())
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, groups, 128)


@pytest.mark.parametrize("width, expected", [(6144, 6144), (4096, 4096), (768, 7168)])
def test_an_experts_width_is_no_draft_width(width, expected):
    target = Qwen3MoeConfig(hidden_size=2048, intermediate_size=width)
    assert derive_draft_config(target, DraftSection()).intermediate_size == expected


def test_a_draft_vocabulary_beyond_the_targets_is_refused():
    derive_draft_config(_llama31(vocab_size=2048), DraftSection(vocab_size=2048))
    with pytest.raises(ValueError, match="draft.vocab_size=2048"):
        derive_draft_config(_llama31(vocab_size=2047), DraftSection(vocab_size=2048))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="head_dim=33"):
        derive_draft_config(GPT2Config(n_embd=66, n_head=2), DraftSection())
    with pytest.raises(ValueError, match="draft.num_attention_heads=20"):
        derive_draft_config(_llama31(), DraftSection(num_attention_heads=20))
    with pytest.raises(ValueError, match="target.aux_layers"):
        derive_draft_config(_llama31(), DraftSection(), (1, 15, 31))


def test_layers_that_would_be_served_wrongly_are_refused(tmp_path):
    target = DeepseekV3Config(hidden_size=512)
    exported = derive_draft_config(target, U32000).to_dict()
    with pytest.raises(ValueError, match="start the list with 1"):
        derive_draft_config(target, U32000, (2, 29, 57))
    exported["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [2, 29, 57]
    exported["eagle_aux_hidden_state_layer_ids"] = [3, 30, 58]
    with pytest.raises(ValueError, match="start the list with 1"):
        derive_draft_config(target, _written(tmp_path, exported))


def test_an_older_published_config_is_understood():
    config = Eagle3Config.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "vocab_size": 500,
            "draft_vocab_size": 100,
            "max_position_embeddings": 2048,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_theta": 5e5,
            "torch_dtype": "float16",
        }
    )
    assert (config.head_dim, config.num_key_value_heads, config.num_hidden_layers) == (16, 4, 1)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert (config.aux_layers, config.target_hidden_size, config.dtype) == (None, 64, "float16")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"norm_before_residual": True}, "norm_before_residual"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_a_draft_cannot_represent_is_refused_by_name(change, words):
    exported = derive_draft_config(_llama31(), U32000).to_dict()
    with pytest.raises(ValueError, match=words):
        Eagle3Config.from_dict(exported | change)


def test_a_targets_own_config_is_not_taken_for_a_drafts(tmp_path):
    own = _llama31().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(ValueError, match="draft config is not of an EAGLE-3 draft.*'LlamaForCausalLM'"):
        Eagle3Config.from_dict(own)
    with pytest.raises(ValueError, match="draft config is not an EAGLE-3 draft's: it has no architectures"):
        Eagle3Config.from_dict(_llama31().to_dict() | {"architectures": None})
    own["max_position_embeddings"] = 131072
    with pytest.raises(ValueError, match=r"draft\.json is not of an EAGLE-3 draft.*'LlamaForCausalLM'"):
        derive_draft_config(_llama31(), _written(tmp_path, own))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["PeagleLlamaForCausalLM"]}, "PeagleLlamaForCausalLM"),
        ({"architectures": ["PEagleDraftModel"]}, "PEagleDraftModel"),
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "Eagle3DeepseekV2ForCausalLM"),
        ({"architectures": ["LlamaForCausalLMEagle"]}, "'LlamaForCausalLMEagle'"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {"mask_token_id": 5}}, "DFlashDraftModel"),
        ({"architectures": "LlamaForCausalLMEagle3"}, "architectures='LlamaForCausalLMEagle3'"),
        ({"parallel_drafting": True}, "parallel_drafting=True"),
        ({"ptd_token_id": 0}, "ptd_token_id=0"),
        ({"pard_token": 128255}, "pard_token=128255"),
        ({"speculators_model_type": "peagle"}, "speculators_model_type='peagle'"),
    ],
)
def test_a_draft_of_another_method_is_refused_by_its_architecture(tmp_path, change, words):
    exported = derive_draft_config(_llama31(), U32000).to_dict() | change
    with pytest.raises(ValueError, match=f"EAGLE-3.*{words}|{words}.*Eagle3") as error:
        derive_draft_config(_llama31(), _written(tmp_path, exported))
    assert str(tmp_path) in str(error.value) and "LlamaForCausalLMEagle3" in str(error.value)


@pytest.mark.parametrize("name", ["LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM"])
def test_the_names_that_eagle3_drafts_are_published_under_are_read(name):
    exported = derive_draft_config(_llama31(), U32000).to_dict() | {"architectures": [name], "parallel_drafting": False}
    assert Eagle3Config.from_dict(exported) == derive_draft_config(_llama31(), U32000)


def test_a_draft_config_file_fixes_every_shape(tmp_path):
    config = derive_draft_config(_llama31(), DraftSection(vocab_size=300, hidden_size=1024), (2, 3, 4))
    assert derive_draft_config(_llama31(), _written(tmp_path, config.to_dict())) == config


def test_a_recipes_layers_win_over_the_files_and_the_rule_fills_what_neither_says(tmp_path):
    exported = derive_draft_config(_llama31(), U32000, (2, 3, 4)).to_dict()
    assert derive_draft_config(_llama31(), _written(tmp_path, exported), (5, 6, 7)).aux_layers == (5, 6, 7)
    assert derive_draft_config(_llama31(), _written(tmp_path, exported)).aux_layers == (2, 3, 4)
    del exported["eagle_config"], exported["eagle_aux_hidden_state_layer_ids"]
    assert derive_draft_config(_llama31(), _written(tmp_path, exported)).aux_layers == (1, 15, 28)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vocab_size": 128000}, "vocab_size=128000"),
        ({"hidden_size": 2048}, "target_hidden_size=2048"),
        ({"max_position_embeddings": 4096}, "max_position_embeddings=4096"),
        ({"eagle_config": {}, "eagle_aux_hidden_state_layer_ids": [2, 16, 32]}, "target.aux_layers"),
    ],
)
def test_a_draft_config_file_of_another_target_is_refused(tmp_path, change, words):
    exported = derive_draft_config(_llama31(), U32000).to_dict() | change
    with pytest.raises(ValueError, match=words):
        derive_draft_config(_llama31(), _written(tmp_path, exported))


def test_derivation_leaves_the_targets_config_alone():
    target = _llama31()
    before = target.to_dict()
    config = derive_draft_config(target, U32000)
    dataclasses.replace(config).rope_parameters["factor"] = 1.0
    assert target.to_dict() == before
