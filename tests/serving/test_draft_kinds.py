"""What servers are told of a draft depends on its config.json alone."""

import pytest

from engine.config.block_sections import BLOCK_METHODS
from engine.serving.draft_kinds import EAGLE3, draft_kind
from tests.block_drafts import make_config, make_method_of


def test_eagle3_drafts_are_known_by_any_of_their_names_and_other_models_are_not():
    for name in ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"):
        assert draft_kind({"architectures": [name]}) == EAGLE3
    assert draft_kind({"architectures": ["LlamaForCausalLM"]}) is None and draft_kind({}) is None


@pytest.mark.parametrize("name", BLOCK_METHODS)
def test_what_a_method_exports_tells_how_many_tokens_its_blocks_draft(name):
    method = make_method_of(name)
    config = make_config(method)
    kind = draft_kind(config.to_dict())
    assert kind is not None and kind.block_tokens == config.num_predictions == method.num_predictions
    assert kind.block_size == config.block_size


def test_only_sglang_serves_the_other_markov_heads():
    config = {"architectures": ["Qwen3DSparkModel"], "block_size": 5}
    methods = {}
    for head in ("vanilla", "gated", "rnn"):
        kind = draft_kind(config | {"markov_head_type": head})
        assert kind is not None and kind.sglang_algorithm == "DSPARK"
        methods[head] = kind.vllm_method
    assert methods == {"vanilla": "dspark", "gated": None, "rnn": None}


def test_the_size_of_blocks_is_found_where_published_drafts_state_it():
    for size in (None, "16", 1):
        with pytest.raises(ValueError, match="block_size"):
            draft_kind({"architectures": ["DFlashDraftModel"], "block_size": size})
    kind = draft_kind({"architectures": ["DFlashDraftModel"], "dflash_config": {"block_size": 4}})
    assert kind is not None and kind.block_tokens == 3
