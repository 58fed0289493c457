"""Facts about target families: which layers feed a draft, and what happens after the head."""

import pytest
from transformers import (
    CohereConfig,
    DeepseekV4Config,
    DogeConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3nTextConfig,
    GraniteConfig,
    HrmTextConfig,
    HunYuanMoEV1Config,
    Inkling2TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    LongcatFlashConfig,
    Qwen3NextConfig,
    Qwen4ExpTextConfig,
    RecurrentGemmaConfig,
)
from transformers.models.chameleon import ChameleonConfig

from engine.models.target_families import (
    CHUNKS_START_WITH_DOCUMENTS,
    FinalLogits,
    check_aux_layers,
    check_family,
    check_served_aux_layers,
    default_aux_layers,
    final_logits,
    num_layers,
    num_streams,
    runs_packed,
    text_config,
)


@pytest.mark.parametrize("num_layers", range(7, 100))
def test_default_layers_are_always_valid(num_layers):
    layers = default_aux_layers(num_layers)
    assert layers == (1, num_layers // 2 - 1, num_layers - 4)
    assert check_aux_layers(layers, num_layers) == layers


@pytest.mark.parametrize("num_layers", range(1, 7))
def test_shallow_targets_need_explicit_layers(num_layers):
    with pytest.raises(ValueError, match="target.aux_layers"):
        default_aux_layers(num_layers)


@pytest.mark.parametrize("layers", [(1, 2), (1, 2, 3, 4), (1, 1, 3), (3, 2, 1), (-1, 2, 3), (1, 2, 7), (1, 2, 8)])
def test_layers_must_be_as_many_as_asked_for_distinct_ascending_and_not_the_last(layers):
    with pytest.raises(ValueError, match="from 0 to 6"):
        check_aux_layers(layers, 8, how_many=3)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k2", "kimi_k25"])
def test_a_family_served_as_deepseek_must_start_at_layer_1(family):
    check_served_aux_layers(family, (1, 29, 57))
    for layers in ((0, 29, 57), (2, 30, 57)):
        with pytest.raises(ValueError, match=rf"target.aux_layers=\[{layers[0]}, .*{family}.*start the list with 1"):
            check_served_aux_layers(family, layers)


def test_other_families_are_served_with_any_layers():
    check_served_aux_layers("llama", (2, 15, 28))


@pytest.mark.parametrize(
    "config, expected",
    [
        (LlamaConfig(), FinalLogits(1.0, None)),
        (Gemma2Config(final_logit_softcapping=30.0), FinalLogits(1.0, 30.0)),
        (Gemma2Config(final_logit_softcapping=None), FinalLogits(1.0, None)),
        (Gemma3Config(text_config={"final_logit_softcapping": 12.0}), FinalLogits(1.0, 12.0)),
        (CohereConfig(logit_scale=0.0625), FinalLogits(0.0625, None)),
        (GraniteConfig(logits_scaling=8.0), FinalLogits(0.125, None)),
        (RecurrentGemmaConfig(logits_soft_cap=20.0), FinalLogits(1.0, 20.0)),
    ],
)
def test_final_logits_of_a_family(config, expected):
    assert final_logits(config) == expected


def test_families_whose_logits_a_draft_cannot_learn_are_refused_by_name():
    with pytest.raises(ValueError, match="chameleon"):
        final_logits(ChameleonConfig())


@pytest.mark.parametrize("config", [Gemma3nTextConfig(), HrmTextConfig(), Inkling2TextConfig(), DogeConfig(is_moe=True)])
def test_families_that_give_a_draft_nothing_to_read_are_refused_by_name(config):
    with pytest.raises(ValueError, match=f"target family '{config.model_type}' .*; use another target"):
        check_family(config)


def test_dense_doge_is_not_refused_for_its_experts():
    check_family(DogeConfig(is_moe=False))


def test_layers_are_counted_as_servers_number_them():
    config = LongcatFlashConfig(num_layers=5)
    assert config.num_hidden_layers == 10 and num_layers(config) == 5
    assert num_layers(LlamaConfig(num_hidden_layers=7)) == 7


@pytest.mark.parametrize(
    "config, expected", [(DeepseekV4Config(hc_mult=3), 3), (Qwen4ExpTextConfig(hc_count=2), 2), (LlamaConfig(), 1)]
)
def test_residual_streams_are_counted(config, expected):
    assert num_streams(config) == expected


def test_wrappers_are_read_through_their_text():
    assert text_config(Gemma3Config(text_config={"hidden_size": 48})).hidden_size == 48


@pytest.mark.parametrize(
    "config, packed",
    [
        (LlamaConfig(), True),
        (Gemma2Config(), True),
        (Gemma3Config(), True),
        (Llama4TextConfig(), CHUNKS_START_WITH_DOCUMENTS),
        (Qwen3NextConfig(), False),
        (LlamaConfig(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), False),
        (HunYuanMoEV1Config(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=1.0, alpha=1000.0)), True),
    ],
)
def test_documents_share_a_forward_only_where_they_cannot_disturb_each_other(config, packed):
    assert runs_packed(config) is packed
