"""The DSpark draft: backbone, Markov head and confidence head, and what the heads learn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.kernels import PLAIN, Kernels, LogitBias
from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_config import BlockConfig
from engine.models.block_drafter.block_objective import BlockObjective, HeadLoss, LearnedRows
from engine.models.block_drafter.block_rows import BlockPlan
from engine.models.dspark.markov_head import GATED, RNN, VANILLA, ConfidenceHead, MarkovHead

SPECFORGE_NAME = "DSparkDraftModel"


@dataclass(frozen=True)
class DSparkConfig(BlockConfig):
    """Config of a DSpark draft.

    markov_head, markov_rank: kind and rank of the Markov head.
    has_confidence: whether there is a confidence head. confidence_reads_markov: whether it reads the
        Markov head's embedding too.
    """

    architecture: ClassVar[str] = "Qwen3DSparkModel"
    projector_types: ClassVar[tuple[str, ...]] = ("dspark",)
    samples_from_anchor: ClassVar[bool] = True

    markov_head: str = VANILLA
    markov_rank: int = 256
    has_confidence: bool = True
    confidence_reads_markov: bool = True

    def top_level_facts(self) -> dict[str, Any]:
        return {
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.aux_layers),
            "markov_rank": self.markov_rank,
            "markov_head_type": self.markov_head,
            "enable_confidence_head": self.has_confidence,
            "confidence_head_with_markov": self.confidence_reads_markov,
            "sample_from_anchor": True,
        }

    @classmethod
    def check_architecture(cls, exported: dict[str, Any], source: str | Path) -> None:
        # Servers run SpecForge's name as their own if the model type is Qwen3's.
        is_of_specforge = exported.get("architectures") == [SPECFORGE_NAME] and exported.get("model_type") == "qwen3"
        if not is_of_specforge:
            super().check_architecture(exported, source)

    @classmethod
    def own_facts(cls, exported: dict[str, Any], source: str | Path) -> dict[str, Any]:
        rank = exported.get("markov_rank")
        if type(rank) is not int or rank < 1:
            raise ValueError(
                f"{source} has markov_rank={rank!r} at the top, where SGLang reads it; it must be at least 1, so copy the keys "
                "of the Markov head and the confidence head from dflash_config to the top"
            )
        kind = exported.get("markov_head_type", VANILLA)
        if kind not in (VANILLA, GATED, RNN):
            raise ValueError(f"{source} has markov_head_type={kind!r}; expected {VANILLA}, {GATED} or {RNN}")
        return {
            "markov_head": kind,
            "markov_rank": rank,
            "has_confidence": bool(exported.get("enable_confidence_head", True)),
            "confidence_reads_markov": bool(exported.get("confidence_head_with_markov", True)),
        }


class DSparkDraft(BlockDraft[DSparkConfig]):
    """Backbone with `markov_head` and, unless left out, `confidence_head`."""

    def __init__(self, config: DSparkConfig, kernels: Kernels = PLAIN) -> None:
        super().__init__(config, kernels)
        rank = config.markov_rank
        self.markov_head = MarkovHead(config.markov_head, config.vocab_size, config.hidden_size, rank)
        self.confidence_head: ConfidenceHead | None = None
        if config.has_confidence:
            self.confidence_head = ConfidenceHead(config.hidden_size, rank if config.confidence_reads_markov else 0)

    def adjusted_logits(self, logits_NSV: Tensor, hidden_NSD: Tensor, previous_NS: Tensor) -> Tensor:
        head = self.markov_head
        state_Nr: Tensor | None = None
        biases: list[Tensor] = []
        for hidden_ND, previous_N in zip(hidden_NSD.unbind(1), previous_NS.unbind(1), strict=True):
            factor_Nr, state_Nr = head.step(head.embed(previous_N), hidden_ND, state_Nr)
            biases.append(factor_Nr.float() @ head.markov_w2.weight.float().T)
        return logits_NSV + torch.stack(biases, 1)


@dataclass(frozen=True)
class DSparkObjective(BlockObjective[DSparkDraft]):
    """Adds the Markov head's bias, and the cross-entropy of the confidence head with the acceptance rate.

    confidence: weight of this cross-entropy.
    """

    confidence: float = 1.0

    def bias(self, draft: DSparkDraft, plan: BlockPlan, hidden_RD: Tensor, previous_R: Tensor) -> LogitBias | None:
        return draft.markov_head.bias(plan, hidden_RD, previous_R)

    @property
    def needs_distribution(self) -> bool:
        return super().needs_distribution or self.confidence > 0

    def head_loss(self, draft: DSparkDraft, learned: LearnedRows) -> HeadLoss | None:
        head = draft.confidence_head
        rate_R = learned.tokens.total_variation_R
        if head is None or not self.confidence:
            return None
        assert rate_R is not None, "needs_distribution"
        accepted_R = (1 - rate_R).clamp(0, 1)
        logit_R = head(learned.hidden_RD, draft.markov_head.embed(learned.previous_R)).to(accepted_R.dtype)
        entropy_R = torch.nn.functional.binary_cross_entropy_with_logits(logit_R, accepted_R, reduction="none")
        weight_R = learned.tokens.weight_R
        if self.rule.separate_heads:
            weight_R = learned.weigh.decayed(weight_R)
        return HeadLoss(self.confidence * entropy_R, weight_R)
