import json
import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from engine.models.target_families import check_family
from engine.parallel.mesh import Group
from engine.parallel.names import Names, names_of, register_family
from engine.parallel.rules import (
    PROOFS,
    ShardSpec,
    Unshardable,
    check_proven,
    linear_cuts,
    mlp_cuts,
)
from tests.parallel.families import all_families, tiny_config

NAMED = ["llama", "llama4_text", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "gpt_oss"]
NAMED += ["glm4_moe", "gemma2", "gemma3_text", "phi3", "mistral", "mixtral", "minimax", "olmoe", "granitemoe"]
NAMED += ["ernie4_5_moe", "hunyuan_v1_moe"]


def test_every_family_that_publishes_a_plan_has_a_proof_or_a_reason():
    proofs = json.loads(PROOFS.read_text(encoding="utf-8"))
    assert set(proofs) == set(all_families())
    assert all((proof["error"] is None) is (proof["reason"] is not None) for proof in proofs.values())
    shared = [family for family, proof in proofs.items() if proof["reason"] is None]
    assert len(shared) >= 99 and sum(proofs[family]["tp"] for family in shared) >= 90
    assert all(proofs[family]["tp"] and proofs[family]["error"] <= 1e-5 for family in NAMED)


def test_what_is_not_shared_is_refused_in_our_own_words_on_one_rank_too():
    proofs = json.loads(PROOFS.read_text(encoding="utf-8"))
    for family in (family for family, proof in proofs.items() if proof["reason"] is not None):
        with pytest.raises(ValueError, match=f"target family '{family}' {re.escape(proofs[family]['reason'])}; use another"):
            check_family(tiny_config(family))


def test_a_family_that_was_not_proven_is_refused_by_name():
    check_proven(LlamaConfig())
    for family, words in (("my_model", "set parallel.allow_unverified=true"), ("hrm_text", "cannot be shared")):
        config = LlamaConfig()
        config.model_type = family
        with pytest.raises(ValueError, match=words):
            check_proven(config)


def test_a_family_is_taught_by_its_names():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.wi = nn.Linear(4, 6)
            self.wo = nn.Linear(6, 4)

    config = LlamaConfig()
    config.model_type = "my_model"
    register_family("my_model", Names(up=("wi",), down=("wo",)))
    cuts = mlp_cuts(Mlp(), Group(2, 1), names_of(config))
    assert cuts["wi.weight"] == cuts["wi.bias"] == ShardSpec(0, ((3, 6),)) and cuts["wo.weight"] == ShardSpec(1, ((3, 6),))
    assert cuts["wo.bias"].zeros
    with pytest.raises(
        Unshardable, match=r"a width of 6 cannot be shared by 4 ranks; use a parallel.tp_size of \[1, 2, 3, 6\]"
    ):
        mlp_cuts(Mlp(), Group(4, 1), names_of(config))


def test_a_bias_that_is_added_once_is_on_the_first_rank():
    linear = nn.Linear(6, 4)
    parts = [linear_cuts(linear, ShardSpec(1, ((3 * rank, 3 * rank + 3),)), Group(2, rank)) for rank in range(2)]
    assert "bias" not in parts[0] and torch.equal(parts[1]["bias"].of(linear.bias.data), torch.zeros(4))
