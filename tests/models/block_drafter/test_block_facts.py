"""Published config.json are read as servers read them, and refused where servers do not agree or compute something else."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from engine.config.block_sections import DFLASH, DFLASH2, DSPARK
from engine.config.recipe import load_config
from engine.models.block_drafter.block_method import HARMLESS
from engine.models.method_registry import make_method
from tests.block_drafts import METHODS, make_method_of
from tests.models.block_drafter.published_drafts import (
    CONFIGS,
    QWEN3_8B,
    TINY,
    Json,
    dflash2_config,
    dflash_config,
    dspark_config,
)
from tests.recipes_configs import target_config

RECIPES = Path(__file__).parents[3] / "launcher" / "recipes"
SOURCE = Path("config.json")
SLIDING = {"use_sliding_window": True, "sliding_window": 9}
MIXED = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
OF_QWEN3_8B = {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]}


def read(method: str, config: Json, num_target_layers: int | None = None) -> Any:
    return make_method_of(method).config_type.from_dict(config, SOURCE, num_target_layers)


def changed(method: str, changes: Json) -> Json:
    """The published config with some keys replaced; `dflash_config` is extended, and None deletes a key."""
    config = CONFIGS[method]()
    nested = config.get("dflash_config", {}) | changes.get("dflash_config", {})
    config |= changes | ({"dflash_config": nested} if nested else {})
    return {key: value for key, value in config.items() if value is not None}


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (DFLASH, dflash_config(QWEN3_8B, OF_QWEN3_8B)),
        (DSPARK, dspark_config(QWEN3_8B, OF_QWEN3_8B) | {"block_size": 7, "markov_rank": 256}),
    ],
)
def test_a_published_draft_of_qwen3_8b_has_the_shapes_of_the_recipe(method, config):
    recipe_method = make_method(load_config(RECIPES / f"qwen3-8b-{method}.yaml", []))
    derived = recipe_method.derive_config(target_config("qwen3-8b"), None)
    found = recipe_method.read_config(config, SOURCE)
    assert {key: value for key, value in vars(found).items() if key not in HARMLESS} == {
        key: value for key, value in vars(derived).items() if key not in HARMLESS
    }


def test_what_dflash2_multiplies_and_caps_is_read():
    head = {"output_multiplier": 0.19611613518, "final_logit_softcapping": 20.0, "input_embedding_scale": 1.0}
    found = read(DFLASH2, changed(DFLASH2, {"dflash_config": head}))
    assert (found.output_multiplier, found.soft_cap) == (0.19611613518, 20.0)
    assert (found.windows, found.is_causal, found.block_size) == ((9, 9), False, 5)
    assert read(DFLASH2, dflash2_config()).soft_cap is None


@pytest.mark.parametrize("method", METHODS)
def test_reading_what_was_written_gives_the_same_config(method):
    for changes in ({}, MIXED | {"is_causal": None}, MIXED | {"is_causal": False}, {"is_causal": True}):
        found = read(method, changed(method, changes))
        assert read(method, found.to_dict()) == found


@pytest.mark.parametrize(
    ("changes", "windows", "is_causal"),
    [
        ({}, (None, None), False),
        ({"is_causal": True}, (None, None), True),
        ({"dflash_config": {"causal": False}}, (None, None), False),
        (MIXED, (9, None), None),
        (MIXED | {"is_causal": False}, (9, None), False),
        (
            MIXED | {"is_causal": False, "dflash_config": {"causal": False, "use_swa": True, "swa_window_size": 9}},
            (9, None),
            False,
        ),
        (SLIDING | {"layer_types": ["sliding_attention"] * 2}, (9, 9), True),
        (SLIDING | {"layer_types": None, "max_window_layers": 1}, (None, 9), None),
    ],
)
def test_windows_and_causality_are_those_that_servers_find(changes, windows, is_causal):
    found = read(DFLASH, changed(DFLASH, changes))
    assert (found.windows, found.is_causal) == (windows, is_causal)
    assert ("is_causal" in found.to_dict()) == (is_causal is not None)


@pytest.mark.parametrize("max_window_layers", [0, 1, 2, None])
@pytest.mark.parametrize("slides", [True, False])
def test_layers_without_types_have_those_of_transformers(slides, max_window_layers):
    changes = {"layer_types": None, "use_sliding_window": slides, "sliding_window": 9, "max_window_layers": max_window_layers}
    config = changed(DFLASH, changes)
    theirs = Qwen3Config(**{key: value for key, value in config.items() if key != "architectures"})
    windows = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types)
    assert read(DFLASH, config).windows == windows


def test_without_a_number_of_target_layers_the_targets_own_counts():
    config = changed(DFLASH, {"num_target_layers": None})
    assert read(DFLASH, config, 9).num_target_layers == 9
    assert read(DFLASH, config).num_target_layers == 5
    assert read(DFLASH, dflash_config(), 9).num_target_layers == TINY["num_target_layers"]
    with pytest.raises(ValueError, match=r"target_layer_ids=\[1, 3\] for a target of 4 layers"):
        read(DFLASH, config, 4)


def test_specforges_name_of_dspark_is_the_one_of_servers():
    as_published = {
        "architectures": ["DSparkDraftModel"],
        "dflash_config": {"projector_type": "dspark", "attention_mode": "gqa"},
    }
    found = read(DSPARK, changed(DSPARK, as_published))
    assert found == read(DSPARK, dspark_config())
    assert found.to_dict()["architectures"] == ["Qwen3DSparkModel"]
    for changes, named in (({"model_type": "deepseek_v4"}, "DSparkDraftModel"), ({"markov_rank": None}, "copy the keys")):
        with pytest.raises(ValueError, match=named):
            read(DSPARK, changed(DSPARK, as_published | changes))


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        (DFLASH, {"dflash_config": {"target_layer_ids": [-1, 3]}}, r"target_layer_ids=\[-1, 3\]"),
        (DFLASH, {"dflash_config": {"target_layer_ids": [1, 5]}}, r"target_layer_ids=\[1, 5\] for a target of 6"),
        (DFLASH, {"dflash_config": {"target_layer_ids": [3, 1]}}, r"target_layer_ids=\[3, 1\]"),
        (DFLASH, {"dflash_config": {"target_layer_ids": [3, 3]}}, r"target_layer_ids=\[3, 3\]"),
        (DSPARK, {"target_layer_ids": [-1, 3]}, r"target_layer_ids=\[-1, 3\]"),
        (DFLASH, {"draft_vocab_size": 32}, "draft_vocab_size=32"),
        (DFLASH2, {"dflash_config": {"input_embedding_scale": 5.65}}, "input_embedding_scale=5.65"),
        (DSPARK, {"logit_scale": 0.5}, "logit_scale=0.5"),
        (DFLASH, {"dflash_config": {"attention_sink_bias": True}}, "attention_sink_bias=True"),
        (DFLASH, {"dflash_config": {"attention_value_scale": 0.7}}, "attention_value_scale=0.7"),
        (DFLASH, {"dflash_config": {"projector_type": "domino", "shift_label": False}}, "projector_type='domino'"),
        (DFLASH, {"dflash_config": {"sample_from_anchor": True}}, "sample_from_anchor=True"),
        (DSPARK, {"dflash_config": {"sample_from_anchor": False}}, "sample_from_anchor=False"),
        (DFLASH, {"dflash_config": {"causal": True}}, "causal=True in dflash_config"),
        (DFLASH, {"is_causal": "false"}, "is_causal='false'"),
        (DFLASH, MIXED | {"dflash_config": {"causal": False}}, "causal=False in dflash_config"),
        (DFLASH, {"dflash_config": {"use_swa": True, "swa_window_size": 9}}, "use_swa"),
        (DFLASH, {"layer_types": None, "dflash_config": {"use_swa": True, "swa_window_size": 9}}, "use_swa"),
        (DFLASH, MIXED | {"dflash_config": {"swa_window_size": 8}}, "swa_window_size=8"),
        (DFLASH, {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        (DFLASH, {"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        (DFLASH2, {"dflash_config": {"conv_kernel_size": 0}}, "conv_kernel_size=0"),
        (DFLASH2, {"dflash_config": {"selector_rank": None}}, "selector_rank=None"),
    ],
)
def test_what_servers_read_otherwise_is_refused_by_name(method, changes, named):
    read(method, CONFIGS[method]())
    with pytest.raises(ValueError, match=named):
        read(method, changed(method, changes))
