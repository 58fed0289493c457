"""Exports hold what servers read, reload as they were, and refuse what a server would read otherwise."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from engine.models.draft_folder import CONFIG, WEIGHTS
from tests.block_drafts import (
    HIDDEN,
    MASK_TOKEN,
    METHODS,
    VOCAB,
    every_token,
    make_batch,
    make_draft,
    make_method_of,
    make_micro,
    make_objective,
    make_tables,
)

BACKBONE = ["fc.weight", "hidden_norm.weight", "norm.weight"]
LAYER = ["input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight"]
LAYER += [f"self_attn.{name}_proj.weight" for name in "qkvo"] + [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
OWN = {
    "dflash": [],
    "dspark": [
        "markov_head.markov_w1.weight",
        "markov_head.markov_w2.weight",
        "confidence_head.proj.weight",
        "confidence_head.proj.bias",
    ],
    "dflash2": [
        "candidate_selector.predecessor_codebook",
        "candidate_selector.successor_codebook",
        "candidate_selector.hidden_projection.weight",
    ],
}
CONVOLUTIONS = [f"{side}_conv.{name}" for side in ("attention", "mlp") for name in ("base_kernel", "kernel_projection.weight")]


def exported(method, folder):
    draft = make_draft(method)
    method.export(folder, draft.named_parameters(), draft.config, every_token(), None)
    return draft


@pytest.mark.parametrize("name", METHODS)
def test_the_folder_has_the_tensors_that_servers_load_and_no_others(name, tmp_path):
    method = make_method_of(name)
    exported(method, tmp_path / "draft")
    layer = LAYER + (CONVOLUTIONS if name == "dflash2" else [])
    expected = BACKBONE + OWN[name] + [f"layers.{index}.{tensor}" for index in range(2) for tensor in layer]
    tensors = load_file(tmp_path / "draft" / WEIGHTS)
    assert sorted(tensors) == sorted(expected)
    assert tensors["fc.weight"].shape == (HIDDEN, 2 * HIDDEN)


@pytest.mark.parametrize("name", METHODS)
def test_the_config_states_every_number_that_servers_would_guess(name, tmp_path):
    method = make_method_of(name, windows=(6, 0))
    exported(method, tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / CONFIG).read_text())
    assert config["architectures"] == [
        {"dflash": "DFlashDraftModel", "dspark": "Qwen3DSparkModel", "dflash2": "DFlash2DraftModel"}[name]
    ]
    assert config["model_type"] == "qwen3"
    assert config["block_size"] == config["dflash_config"]["block_size"] == 5
    assert config["dflash_config"]["mask_token_id"] == MASK_TOKEN
    assert config["dflash_config"]["target_layer_ids"] == [1, 3]
    assert config["is_causal"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    read = Qwen3Config(**{key: value for key, value in config.items() if key != "architectures"})
    assert (read.head_dim, read.num_key_value_heads, read.vocab_size) == (8, 2, VOCAB)
    assert read.sliding_window == 6
    assert read.layer_types == ["sliding_attention", "full_attention"]
    if name == "dspark":
        top = {"markov_rank": 6, "markov_head_type": "vanilla", "sample_from_anchor": True, "mask_token_id": MASK_TOKEN}
        assert top.items() <= config.items()
        assert config["confidence_head_with_markov"] is True
        assert config["target_layer_ids"] == [1, 3]
    if name == "dflash2":
        own = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 5, "selector_top_k": 12}
        assert own.items() <= config["dflash_config"].items()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("block", [{}, {"attention_bias": True, "causal": True}])
def test_a_reloaded_draft_is_the_trained_one(name, block, tmp_path):
    method = make_method_of(name, **block)
    draft = exported(method, tmp_path / "draft")
    served = method.load(tmp_path / "draft", make_tables())
    assert served.model.config == draft.config
    batch = make_batch((17, 23))
    micro = make_micro(method, batch)
    expected = torch.stack(make_objective(method).logits(draft, micro))
    assert expected.shape == (method.num_predictions, 32, VOCAB)
    torch.testing.assert_close(served.logits(micro), expected, rtol=0, atol=0)
    for parameter in draft.parameters():
        kept = parameter.data.clone()
        parameter.data.mul_(1.5).add_(0.1)
        if torch.equal(torch.stack(make_objective(method).logits(draft, micro)), expected):
            assert parameter is draft.get_parameter("confidence_head.proj.weight") or parameter.shape == (1,)
        parameter.data.copy_(kept)


def test_published_folders_with_copies_of_the_targets_tensors_can_be_read_and_trained_further(tmp_path):
    method = make_method_of("dflash")
    draft = exported(method, tmp_path / "draft")
    tensors = {f"model.{name}": tensor for name, tensor in load_file(tmp_path / "draft" / WEIGHTS).items()}
    save_file(tensors | {"lm_head.weight": torch.zeros(VOCAB, HIDDEN)}, tmp_path / "draft" / WEIGHTS)
    served = method.load(tmp_path / "draft", make_tables())
    recipe = replace(method.recipe, draft=replace(method.recipe.draft, init_from=str(tmp_path / "draft")))
    again = type(method)(recipe)
    started = again.new_draft(draft.config, draft.kernels, make_tables(), every_token())
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(started.get_parameter(name), parameter, rtol=0, atol=0)
        torch.testing.assert_close(served.model.get_parameter(name), parameter, rtol=0, atol=0)
    assert again.notes
    with pytest.raises(ValueError, match="block_size=5, not 4"):
        again.new_draft(replace(draft.config, block_size=4), draft.kernels, make_tables(), every_token())


def test_a_tensor_that_is_missing_unknown_or_not_finite_is_named(tmp_path):
    method = make_method_of("dflash")
    draft = make_draft(method)
    weights = dict(draft.named_parameters())
    for change, named in (
        ({"norm.weight": None}, "norm.weight"),
        ({"markov_head.markov_w1.weight": torch.zeros(2)}, "markov_head"),
        ({"norm.weight": torch.full((HIDDEN,), torch.nan)}, "norm.weight"),
        ({"norm.weight": torch.zeros(3)}, "norm.weight"),
    ):
        changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
        with pytest.raises(ValueError, match=named):
            method.export(tmp_path / "draft", changed.items(), draft.config, every_token(), None)
        assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"aux_layers": (1, 5)}, "aux_layers"),
        ({"aux_layers": (3, 1)}, "aux_layers"),
        ({"windows": (4, 6)}, "windows"),
    ],
)
def test_what_servers_cannot_represent_is_refused(change, named, tmp_path):
    method = make_method_of("dflash")
    draft = make_draft(method)
    with pytest.raises(ValueError, match=named):
        method.export(tmp_path / "draft", draft.named_parameters(), replace(draft.config, **change), every_token(), None)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("dflash", {"architectures": ["DSparkDraftModel"]}, "DSparkDraftModel"),
        ("dflash", {"block_size": 7}, "block_size"),
        ("dflash", {"hidden_size": None}, "hidden_size"),
        ("dflash", {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window"),
        ("dspark", {"markov_rank": 0}, "markov_rank"),
        ("dspark", {"sample_from_anchor": False}, "sample_from_anchor"),
        ("dspark", {"markov_head_type": "lstm"}, "markov_head_type"),
        ("dflash2", {"dflash_config": {"block_size": 5, "mask_token_id": 1, "target_layer_ids": [1]}}, "conv_kernel_size"),
    ],
)
def test_a_config_that_servers_would_read_otherwise_is_refused(name, change, named, tmp_path):
    method = make_method_of(name)
    exported(method, tmp_path / "draft")
    path = tmp_path / "draft" / CONFIG
    with pytest.raises(ValueError, match=named):
        method.read_config(json.loads(path.read_text()) | change, path)


def test_without_its_target_a_draft_cannot_be_loaded(tmp_path):
    method = make_method_of("dflash")
    exported(method, tmp_path / "draft")
    with pytest.raises(ValueError, match="name the target"):
        method.load(tmp_path / "draft", None)
