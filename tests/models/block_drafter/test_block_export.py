"""Exports hold what servers read, reload as they were, and refuse what a server would read otherwise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config

from engine.kernels import PLAIN
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.draft_folder import CONFIG, WEIGHTS
from tests.block_drafts import (
    HIDDEN,
    MASK_TOKEN,
    METHODS,
    VOCAB,
    every_token,
    make_batch,
    make_config,
    make_draft,
    make_method_of,
    make_micro,
    make_objective,
    make_tables,
)
from tests.models.block_drafter.published_drafts import CONFIGS, published_tensors, write_published

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
@pytest.mark.parametrize("block", [{}, {"attention_bias": True, "causal": True}, {"causal": None, "windows": (6, 0)}])
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


def copies_of_target() -> dict[str, torch.Tensor]:
    """The tables of the target, as other trainers add them to a draft."""
    tables = make_tables()
    return {"embed_tokens.weight": tables.embedding.weight_VD.bfloat16(), "lm_head.weight": tables.head.weight_VD.bfloat16()}


def method_that_starts_from(folder: Path, name: str, **block: Any) -> BlockMethod:
    method = make_method_of(name, **block)
    return type(method)(replace(method.recipe, draft=replace(method.recipe.draft, init_from=str(folder))))


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_published_folder_is_served_and_trained_further(name, num_files, tmp_path):
    tensors = published_tensors(name)
    prefix = "model." if name == "dflash2" else ""
    written = {prefix + key: tensor for key, tensor in tensors.items()}
    if name == "dspark":
        written |= copies_of_target()
    write_published(tmp_path / "draft", CONFIGS[name](), written, num_files)
    windows = (9, 9) if name == "dflash2" else None
    method = method_that_starts_from(tmp_path / "draft", name, windows=windows)
    served = method.load(tmp_path / "draft", make_tables(), torch.float32)
    started = method.new_draft(make_config(method), PLAIN, make_tables(), every_token())
    assert method.notes
    assert {name for name, _ in started.named_parameters()} == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(served.model.get_parameter(key), tensor.float())
        assert torch.equal(started.get_parameter(key), tensor.float())
    micro = make_micro(method, make_batch((17, 23)))
    logits = torch.stack(make_objective(method).logits(started, micro))
    torch.testing.assert_close(served.logits(micro), logits, rtol=0, atol=0)


def test_a_draft_of_another_shape_does_not_start_a_run(tmp_path):
    write_published(tmp_path / "draft", CONFIGS["dflash"](), published_tensors("dflash"))
    method = method_that_starts_from(tmp_path / "draft", "dflash")
    with pytest.raises(ValueError, match="block_size=5, not 4"):
        method.new_draft(replace(make_config(method), block_size=4), PLAIN, make_tables(), every_token())


def test_a_run_takes_the_number_of_layers_from_its_target_if_the_draft_does_not_state_it(tmp_path):
    config = CONFIGS["dflash"]()
    del config["num_target_layers"]
    write_published(tmp_path / "draft", config, published_tensors("dflash"))
    method = method_that_starts_from(tmp_path / "draft", "dflash")
    own = make_config(method)
    assert own.num_target_layers > max(own.aux_layers) + 2
    assert method.new_draft(own, PLAIN, make_tables(), every_token()).config is own


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_a_table_that_was_trained_with_the_draft_is_refused(name, tmp_path):
    copies = copies_of_target()
    copies[name][VOCAB - 1, 0] += 0.5
    write_published(tmp_path / "draft", CONFIGS["dflash"](), published_tensors("dflash") | copies)
    method = method_that_starts_from(tmp_path / "draft", "dflash")
    for use in (
        lambda: method.load(tmp_path / "draft", make_tables()),
        lambda: method.new_draft(make_config(method), PLAIN, make_tables(), every_token()),
    ):
        with pytest.raises(ValueError, match=f"has its own {name}, unlike the target's"):
            use()


def test_a_file_of_the_index_that_is_missing_is_named(tmp_path):
    write_published(tmp_path / "draft", CONFIGS["dflash"](), published_tensors("dflash"), num_files=2)
    (tmp_path / "draft" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is missing"):
        make_method_of("dflash").load(tmp_path / "draft", make_tables())


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
