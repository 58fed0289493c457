"""Names of maps come from those that are usual and from the plan that a config publishes."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from engine.config.sections import TargetSection
from engine.parallel.mesh import Group, TargetMesh
from engine.parallel.names import Names, names_of
from engine.parallel.plan import TargetPlan
from engine.parallel.rules import PROOFS
from engine.target.structure import decoder_of, without_weights
from tests.parallel.families import tiny_config

SHARED = {"colwise", "rowwise", "rowwise_split_input", "packed_colwise", "packed_rowwise", "moe_tp_experts", "grouped_gemm"}
BY_TWO = {
    "base_model_tp_plan": TargetMesh(Group(2, 0), Group(1, 0)),
    "base_model_ep_plan": TargetMesh(Group(1, 0), Group(2, 0)),
}
WHOLE = {  # on every rank, for reasons that docs/targets.md names
    "axk2": {"layers.*.self_attn"},
    "deepseek_v4": {"layers.*.self_attn"},
    "doge": {"layers.*.self_attn"},
    "inkling_text": {"layers.*.attn_sconv", "layers.*.mlp.shared_experts", "layers.*.mlp_sconv", "layers.*.self_attn"},
    "jamba": {"layers.*.mamba"},
    "qwen4_exp_text": {"layers.*.ple"},
    "zaya": {"layers.*.self_attn"},
}
# test_rules.py: the file names every family.
PROVEN = [family for family, proof in json.loads(PROOFS.read_text(encoding="utf-8")).items() if proof["reason"] is None]


def test_names_of_a_published_plan_are_read_beside_the_usual_ones():
    class Config(LlamaConfig):
        base_model_tp_plan = {
            "layers.*.attention.wq": "colwise",
            "layers.*.attention.key_proj": "colwise",
            "layers.*.attention.v_proj": "colwise",
            "layers.*.attention.v_norm": "colwise",
            "layers.*.attention.wo": "rowwise",
            "layers.*.feed_forward.w1": "colwise",
            "layers.*.feed_forward.w2": "rowwise",
            "layers.*.feed_forward.w13": "packed_colwise",
            "layers.*.mixer.conv": "colwise",
        }

    usual = Names()
    assert names_of(Config()) == Names(
        queries=(*usual.queries, "wq"),
        keys=(*usual.keys, "key_proj"),
        outputs=(*usual.outputs, "wo"),
        up=(*usual.up, "w1"),
        fused_up=(*usual.fused_up, "w13"),
        down=(*usual.down, "w2"),
    )


def _decoder(family: str) -> PreTrainedModel:
    return decoder_of(without_weights(tiny_config(family), TargetSection(), torch.device("cpu")))


def _whole(family: str) -> set[str]:
    plan = TargetPlan.of(_decoder(family), BY_TWO["base_model_tp_plan"])
    return {re.sub(r"\.\d+", ".*", name) for name in plan.replicated}


def _unshared(family: str, field: str) -> list[str]:
    """Parameters that the published plan shares, and ours neither shares nor names with a reason."""
    decoder = _decoder(family)
    plan = TargetPlan.of(decoder, BY_TWO[field])
    tensors = dict(decoder.named_parameters())
    found = []
    for pattern, style in (getattr(decoder.config, field, None) or {}).items():
        if "hyper_connection" in pattern:  # small maps that mix residual streams run on own tokens, at no exchange
            continue
        # plans of experts name dense maps, too: those are shared by ranks of tensor parallelism
        if style in SHARED and (field == "base_model_tp_plan" or style == "grouped_gemm"):
            named = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"(\..+)?")
            found += [name for name in filter(named.fullmatch, tensors) if name not in plan.cuts]
    replicated = tuple(f"{part}." for part in plan.replicated)
    return [name for name in found if not name.startswith(replicated) and not name.endswith("bias")]  # some are on one rank


@pytest.mark.parametrize("field", BY_TWO)
def test_what_published_plans_share_is_shared_or_named(field):
    unshared = {family: names for family in PROVEN if (names := _unshared(family, field))}
    assert not unshared


def test_few_modules_stay_whole():
    assert {family: whole for family in PROVEN if (whole := _whole(family))} == WHOLE


def test_what_no_rule_shares_would_be_found(monkeypatch):
    monkeypatch.setattr("engine.parallel.plan.is_mlp", lambda module, names: False)
    assert "layers.0.mlp.gate_proj.weight" in _unshared("llama", "base_model_tp_plan")
    monkeypatch.setattr("engine.parallel.plan.is_attention", lambda module, names: False)
    assert _whole("llama") == {"layers.*.self_attn"}
