"""Golden cases of block drafters, whose losses and gradients agree with four public trainers; see tests/golden/README.md."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.batch import MicroBatch, PackedBatch, TargetOutput
from engine.kernels import PLAIN, FrozenHead, Kernels, TokenTerms
from engine.kernels.interface import LogitTransform
from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_config import BlockConfig
from engine.models.block_drafter.block_objective import BlockLossRule, BlockObjective, LearnedRows
from engine.models.block_drafter.block_rows import BlockPlan, BlockShape, plan_anchors
from engine.models.dflash.dflash_draft import DFlashConfig, DFlashDraft
from engine.models.dflash2.dflash2_draft import DFlash2Config, DFlash2Draft, DFlash2Objective
from engine.models.dspark.dspark_draft import DSparkConfig, DSparkDraft, DSparkObjective
from engine.parallel.objective import DivisorScope

FOLDER = Path(os.environ.get("DRAFTSPEED_GOLDEN_BLOCKS", Path(__file__).parents[2] / "golden/blocks"))
FROZEN = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Head:
    """The target's head in the precision of a case; that of a run computes logits in fp32."""

    weight_VD: Tensor

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND @ self.weight_VD.T


@dataclass(frozen=True)
class Case:
    """A variant of a golden file. tensors: widened to `dtype` where they are floats. facts: its configuration."""

    name: str
    variant: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def weights(self) -> dict[str, Tensor]:
        return {key.removeprefix("w."): tensor for key, tensor in self.tensors.items() if key.startswith("w.")}

    @property
    def gradients(self) -> dict[str, Tensor]:
        prefix = f"grad.{self.variant}."
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}

    def out(self, term: str) -> Tensor | None:
        return self.tensors.get(f"out.{self.variant}.{term}")

    @property
    def batch(self) -> PackedBatch:
        """The row as a packed batch; positions of padding become a last document without assistant tokens."""
        document_T = self.tensors["in.doc"]
        starts = [0, *(document_T.diff().nonzero().flatten() + 1).tolist(), len(document_T)]
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
        mask_T = self.tensors["in.mask"].bool() & (document_T >= 0)
        return PackedBatch(self.tensors["in.ids"], mask_T, cu_seqlens)

    @property
    def anchors(self) -> tuple[Tensor, Tensor]:
        """Packed positions of the real anchors that have a slot with loss, ascending, and their slots, bool [N, S]."""
        learns_NB = self.tensors["out.slots"].bool() & self.tensors["in.keep"][:, None]
        learns_NS = learns_NB if self.facts["shift"] else learns_NB[:, 1:]
        anchor_N = self.tensors["in.anchors"]
        chosen = learns_NS.any(1).nonzero().flatten()
        chosen = chosen[anchor_N[chosen].argsort(stable=True)]
        return anchor_N[chosen], learns_NS[chosen]


def read_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield all variants of all files."""
    for path in sorted(FOLDER.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata()
        own = {}
        for key, x in tensors.items():
            is_input = x.is_floating_point() and key.startswith(("in.", "w."))
            own[key] = x.to(dtype) if is_input else x
        for variant, facts in sorted(metadata.items()):
            if facts.startswith("{"):
                yield Case(path.stem, variant, json.loads(facts), own, dtype)


def make_config(case: Case) -> BlockConfig:
    """Return the draft's config of a case."""
    facts = case.facts
    weights = case.weights
    vocab_size, size = weights["embed_tokens.weight"].shape
    shared = dict(
        hidden_size=size,
        intermediate_size=weights["layers.0.mlp.gate_proj.weight"].shape[0],
        num_attention_heads=facts["heads"],
        num_key_value_heads=facts["kv_heads"],
        head_dim=facts["head_dim"],
        num_hidden_layers=facts["layers"],
        rms_norm_eps=facts["eps"],
        hidden_act="silu",
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": facts["theta"]},
        vocab_size=vocab_size,
        num_target_layers=9,
        aux_layers=tuple(range(weights["fc.weight"].shape[1] // size)),
        block_size=facts["block_size"],
        mask_token_id=facts["mask_token_id"],
        windows=tuple(facts["windows"]),
        is_causal=facts["causal"][0],
        attention_bias="layers.0.self_attn.q_proj.bias" in weights,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    if facts["family"] == "dspark":
        has_confidence = "confidence_head.proj.weight" in weights
        return DSparkConfig(
            **shared,
            markov_head=facts["markov"],
            markov_rank=facts["rank"],
            has_confidence=has_confidence,
            confidence_reads_markov=facts["conf_with_markov"],
        )
    if facts["family"] == "dflash2":
        return DFlash2Config(
            **shared,
            conv_taps=facts["conv_taps"],
            conv_group=facts["conv_group"],
            selector_rank=facts["selector_rank"],
            selector_top_k=facts["selector_top_k"],
            output_multiplier=facts["output_multiplier"],
            soft_cap=facts["softcap"],
        )
    return DFlashConfig(**shared)


DRAFTS = {"dflash": DFlashDraft, "dspark": DSparkDraft, "dflash2": DFlash2Draft}


def make_draft(case: Case, kernels: Kernels = PLAIN) -> BlockDraft:
    """Return the draft of a case with its weights."""
    draft = DRAFTS[case.facts["family"]](make_config(case), kernels).to(case.dtype)
    draft.load_state_dict({name: tensor for name, tensor in case.weights.items() if name not in FROZEN})
    draft.mask_embed_D.copy_(case.weights["embed_tokens.weight"][case.facts["mask_token_id"]])
    return draft


def make_objective(case: Case, compaction: bool = True, chunk_mb: int | None = None) -> BlockObjective:
    """Return the objective of a case."""
    facts = case.facts
    terms = facts["terms"]
    assert not (terms.get("ce") and terms.get("ce_argmax")), "one label per row"
    rule = BlockLossRule(
        terms=TokenTerms(
            cross_entropy=terms.get("ce", 0.0) + terms.get("ce_argmax", 0.0),
            kl=terms.get("kl", 0.0),
            total_variation=2 * terms.get("l1", 0.0) + terms.get("tv", 0.0),
        ),
        uses_argmax=bool(terms.get("ce_argmax")),
        decay=facts["gamma"] or 0.0,
        dpace_alpha=facts["dpace_alpha"] if facts["weight"] == "dpace" else None,
        divisor={"weights": "weights", "count": "rows", "batch": "one"}[facts["norm"]],
        divisor_offset=facts["norm_eps"],
        scope=DivisorScope.MICRO_BATCH if facts["weight"] == "dpace" else DivisorScope.GLOBAL_BATCH,
    )
    shape = BlockShape(
        facts["block_size"],
        facts["shift"],
        tuple(facts["windows"]),
        facts["causal"][0],
        window_from_anchor=facts["window_rule"] != "query",
    )
    head = Head(case.weights["lm_head.weight"])
    transform = LogitTransform(facts["output_multiplier"], facts["softcap"])
    num_predictions = facts["block_size"] - 1 + facts["shift"]
    shared = dict(
        num_predictions=num_predictions,
        shape=shape,
        rule=rule,
        head=head,
        frozen_head=FrozenHead(head.weight_VD, transform),
        compaction=compaction,
        chunk_mb=chunk_mb,
    )
    if facts["family"] == "dspark":
        return DSparkObjective(**shared, confidence=facts["conf_alpha"])
    if facts["family"] == "dflash2":
        return DFlash2Objective(
            **shared,
            top_k=facts["selector_top_k"],
            selector=facts["selector_alpha"],
            injects=facts["selector_inject"],
            divides_by_covered=facts["selector_norm"] == "covered",
        )
    return BlockObjective(**shared)


def make_micro(case: Case, learns_ST: Tensor) -> MicroBatch:
    """Return the micro-batch of a case. learns_ST: its rows with loss, as `DraftMethod.allowed_rows` returns them."""
    last_hidden_TD = case.tensors["in.last"]
    slots_N = torch.arange(len(last_hidden_TD))
    logits_TV = last_hidden_TD @ case.weights["lm_head.weight"].T
    target = TargetOutput(
        case.tensors["in.aux"], slots_N, last_hidden_TD, logits_TV.argmax(-1).int(), logits_TV.logsumexp(-1).float()
    )
    embed_TD = case.weights["embed_tokens.weight"][case.batch.input_ids_T]
    return MicroBatch(case.batch, target, embed_TD, learns_ST)


def divisor_of(rule: BlockLossRule, counts_S: Tensor) -> Tensor:
    """Return the divisor of a case in its precision. counts_S: rows with loss of each prediction."""
    if rule.divisor == "one":
        return torch.ones_like(counts_S[0]) + rule.divisor_offset
    weights_S = torch.ones_like(counts_S)
    if rule.divisor == "weights" and rule.dpace_alpha is None:
        weights_S = torch.tensor(rule.prediction_weights(len(counts_S)), dtype=counts_S.dtype)
    return (counts_S * weights_S).sum() + rule.divisor_offset


def learn(case: Case, draft: BlockDraft, objective: BlockObjective) -> tuple[BlockPlan, LearnedRows]:
    """Return the plan and the loss of a case."""
    anchor_N, learns_NS = case.anchors
    plan = plan_anchors(case.batch, anchor_N, learns_NS, objective.shape, objective.compaction)
    counts_S = learns_NS.sum(0).to(case.dtype)
    micro = make_micro(case, torch.zeros(learns_NS.shape[1], case.batch.num_tokens, dtype=torch.bool))
    return plan, objective.learn(draft, micro, plan, divisor_of(objective.rule, counts_S))
