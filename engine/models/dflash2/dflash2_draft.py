"""The DFlash2 draft: backbone with convolutions within the blocks, and a candidate selector."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from engine.kernels import PLAIN, Kernels
from engine.kernels.recompute import recomputed
from engine.kernels.reference import upcast
from engine.models.block_drafter.backbone import BlockDraft, BlockLayer, LayerInputs, spread
from engine.models.block_drafter.block_config import BlockConfig
from engine.models.block_drafter.block_objective import BlockObjective, HeadLoss, LearnedRows
from engine.models.block_drafter.block_rows import BlockPlan
from engine.models.dflash2.block_convolution import BlockConvolution
from engine.models.dflash2.candidate_selector import CandidateSelector


@dataclass(frozen=True)
class DFlash2Config(BlockConfig):
    """Config of a DFlash2 draft.

    conv_taps, conv_group: rows that a convolution reads, and features that share a dynamic kernel.
    selector_rank, selector_top_k: rank of the selector, and candidates per row.
    output_multiplier, soft_cap: factor and tanh cap of the logits; None = no cap.
    """

    architecture: ClassVar[str] = "DFlash2DraftModel"
    projector_types: ClassVar[tuple[str, ...]] = ("dflash", "dflash2")

    conv_taps: int = 2
    conv_group: int = 16
    selector_rank: int = 256
    selector_top_k: int = 16
    output_multiplier: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.conv_group:
            raise ValueError(f"block.conv_group={self.conv_group} does not divide the hidden size {self.hidden_size}")
        if self.selector_top_k > self.vocab_size:
            raise ValueError(f"block.selector_top_k={self.selector_top_k} exceeds the vocabulary of {self.vocab_size} tokens")

    def block_facts(self) -> dict[str, Any]:
        return super().block_facts() | {
            "conv_kernel_size": self.conv_taps,
            "conv_group_size": self.conv_group,
            "selector_rank": self.selector_rank,
            "selector_top_k": self.selector_top_k,
            "output_multiplier": self.output_multiplier,
            "final_logit_softcapping": self.soft_cap,
        }

    @classmethod
    def own_facts(cls, exported: dict[str, Any], source: str | Path) -> dict[str, Any]:
        nested = exported.get("dflash_config") or {}
        names = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
        for name in names:
            value = nested.get(name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{source} has {name}={value!r} in dflash_config; servers expect a number of at least 1 there")
        soft_cap = nested.get("final_logit_softcapping")
        return {
            "conv_taps": nested["conv_kernel_size"],
            "conv_group": nested["conv_group_size"],
            "selector_rank": nested["selector_rank"],
            "selector_top_k": nested["selector_top_k"],
            "output_multiplier": float(nested.get("output_multiplier") or 1.0),
            "soft_cap": float(soft_cap) if soft_cap and soft_cap > 0 else None,
        }


class DFlash2Layer(BlockLayer):
    """A layer with a convolution around attention and one around the MLP."""

    def __init__(self, config: DFlash2Config, kernels: Kernels) -> None:
        super().__init__(config, kernels)
        size = config.hidden_size
        self.attention_conv = BlockConvolution(size, config.conv_taps, config.conv_group)
        self.mlp_conv = BlockConvolution(size, config.conv_taps, config.conv_group)


class DFlash2Draft(BlockDraft[DFlash2Config]):
    """Backbone with convolutions, and `candidate_selector`."""

    def __init__(self, config: DFlash2Config, kernels: Kernels = PLAIN) -> None:
        super().__init__(config, kernels)
        self.candidate_selector = CandidateSelector(config.vocab_size, config.hidden_size, config.selector_rank)

    def draw_weights(self) -> None:
        super().draw_weights()
        for module in self.modules():
            if isinstance(module, BlockConvolution):
                module.reset()

    def adjusted_logits(self, logits_NSV: Tensor, hidden_NSD: Tensor, previous_NS: Tensor) -> Tensor:
        return logits_NSV + self.candidate_selector.all_scores(previous_NS, hidden_NSD)

    def make_layer(self) -> BlockLayer:
        return DFlash2Layer(self.config, self.kernels)

    def last_layer_rows(self, plan: BlockPlan) -> Tensor:
        # The convolutions of the outputs read the rows before the ones with loss, but none behind them.
        return plan.leading_row_Q

    def first_inputs(self, layer: BlockLayer, anchor_embed_ND: Tensor, plan: BlockPlan) -> LayerInputs:
        """Project the rows of the first layer; those whose convolution reads mask rows alone have one input."""
        convolution = cast(DFlash2Layer, layer).attention_conv
        state_MD = torch.cat((anchor_embed_ND, self.mask_embed_D.to(anchor_embed_ND.dtype)[None]))
        y_MD = layer.input_layernorm(state_MD)
        kernel_M2JG = convolution.dynamic_kernels(y_MD)
        first = FirstRows.of(plan, convolution.taps)
        mixed_FD = convolution(first.of_tokens(y_MD), 0, first.of_tokens(kernel_M2JG[:, 0]), first.offset_F)
        query_FHE = layer.self_attn.queries(mixed_FD)
        key_FGE, value_FGE = layer.self_attn.keys_and_values(mixed_FD)
        return LayerInputs(
            state_QD=spread(state_MD, plan),
            query_QHE=first.spread(query_FHE),
            key_PGE=first.spread(key_FGE),
            value_PGE=first.spread(value_FGE),
            kernel=spread(kernel_M2JG[:, 1], plan),
        )

    def before_attention(self, layer: BlockLayer, y_PD: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor | None]:
        convolution = cast(DFlash2Layer, layer).attention_conv
        kernel_P2JG = convolution.dynamic_kernels(y_PD)
        return convolution(y_PD, 0, kernel_P2JG[:, 0], plan.offset_P), kernel_P2JG[:, 1]

    def after_attention(self, layer: BlockLayer, inputs: LayerInputs, attended_QD: Tensor, offset_Q: Tensor) -> Tensor:
        assert inputs.kernel is not None, "the kernel of the output was computed with the inputs"
        return cast(DFlash2Layer, layer).attention_conv(attended_QD, 1, inputs.kernel, offset_Q)

    def mlp_output(self, layer: BlockLayer, state_QD: Tensor, offset_Q: Tensor) -> Tensor:
        convolution = cast(DFlash2Layer, layer).mlp_conv
        z_QD = layer.post_attention_layernorm(state_QD)
        kernel_Q2JG = convolution.dynamic_kernels(z_QD)
        output_QD = layer.mlp(convolution(z_QD, 0, kernel_Q2JG[:, 0], offset_Q))
        return convolution(output_QD, 1, kernel_Q2JG[:, 1], offset_Q)


@dataclass(frozen=True)
class FirstRows:
    """The rows of the first layer whose convolved inputs differ: the first `taps` of each block, and one for all later ones.

    anchor_row_N: int64, index of each anchor's row among the F rows. The others read the mask token.
    offset_F: int64, index of each row in its block. The last row stands for all later rows; its offset is `taps`.
    place_P: int64, index among the F rows of each row of the blocks, if `is_first_P`.
    is_first_P: bool, whether a row is one of the first `taps` of its block.
    """

    anchor_row_N: Tensor
    offset_F: Tensor
    place_P: Tensor
    is_first_P: Tensor

    @classmethod
    def of(cls, plan: BlockPlan, taps: int) -> "FirstRows":
        num_blocks = len(plan.anchor_N)
        device = plan.offset_P.device
        anchor_row_N = torch.arange(num_blocks, device=device) * taps
        offset_F = torch.arange(num_blocks * taps + 1, device=device) % taps
        offset_F[-1] = taps
        place_P = plan.block_P * taps + plan.offset_P.clamp(max=taps - 1)
        return cls(anchor_row_N, offset_F, place_P, plan.offset_P < taps)

    def of_tokens(self, x_M: Tensor) -> Tensor:
        """Return one row per F row, from one per anchor and one for the mask token, [N + 1, ...]."""
        mask_F = x_M[-1:].expand(len(self.offset_F), *x_M.shape[1:])
        return mask_F.index_copy(0, self.anchor_row_N, x_M[:-1])

    def spread(self, x_F: Tensor) -> Tensor:
        """Return one row per row of the blocks, [P, ...]."""
        is_first_P = self.is_first_P.view(-1, *[1] * (x_F.dim() - 1))
        return torch.where(is_first_P, x_F[self.place_P], x_F[-1:])


@dataclass(frozen=True)
class DFlash2Objective(BlockObjective[DFlash2Draft]):
    """Adds the cross-entropy of the candidate selector, given the true token before each row.

    top_k: candidates per row. selector: weight of this cross-entropy.
    injects: whether a label that is no candidate replaces the weakest one; otherwise its row is left out.
    divides_by_covered: whether the divisor is the weight of the rows whose label is a candidate.
    """

    top_k: int = 16
    selector: float = 1.0
    injects: bool = False
    divides_by_covered: bool = False

    @property
    def num_candidates(self) -> int:
        return self.top_k if self.selector else 0

    def head_loss(self, draft: DFlash2Draft, learned: LearnedRows) -> HeadLoss | None:
        best_RK = learned.tokens.best_RK
        if best_RK is None:
            return None
        label_R = learned.label_R
        assert label_R is not None, "`needs_head_stats`"
        hidden_RD = learned.hidden_RD
        candidate_RK = self._candidates(best_RK, label_R)
        is_label_RK = candidate_RK == label_R[:, None]
        is_covered_R = is_label_RK.any(1)
        logits_RK = self._candidate_logits(hidden_RD, candidate_RK)
        scores_RK = draft.candidate_selector.scores(logits_RK, candidate_RK, learned.previous_R, hidden_RD)
        place_R1 = is_label_RK.to(torch.uint8).argmax(1, keepdim=True)
        entropy_R = -scores_RK.log_softmax(-1).gather(1, place_R1)[:, 0] * is_covered_R
        weight_R = learned.tokens.weight_R
        if self.rule.separate_heads:
            weight_R = learned.weigh(entropy_R.detach())
        if self.divides_by_covered:
            covered = (weight_R * is_covered_R).sum()
            weight_R = weight_R / torch.where(covered > 0, covered, 1)
        return HeadLoss(self.selector * entropy_R, weight_R)

    def _candidates(self, best_RK: Tensor, label_R: Tensor) -> Tensor:
        """Return the candidates of each row, int64 [R, K]. best_RK: the most likely tokens."""
        if not self.injects:
            return best_RK
        is_missing_R = (best_RK != label_R[:, None]).all(1)
        weakest_R = torch.where(is_missing_R, label_R, best_RK[:, -1])
        return torch.cat((best_RK[:, :-1], weakest_R[:, None]), 1)

    def _candidate_logits(self, hidden_RD: Tensor, candidate_RK: Tensor) -> Tensor:
        """Return the logits of candidates, [R, K], from the rows of the head that they need, in chunks of rows.

        The rows of the head are read again in the backward pass, so those of one chunk exist at a time.
        """
        row_bytes = self.top_k * hidden_RD.shape[1] * self.frozen_head.weight_VD.itemsize
        rows_per_chunk = max(1, self.chunk_bytes(hidden_RD) // row_bytes)
        pairs = zip(hidden_RD.split(rows_per_chunk), candidate_RK.split(rows_per_chunk), strict=True)
        return torch.cat([recomputed(self._products, hidden, candidates) for hidden, candidates in pairs])

    def _products(self, hidden_rD: Tensor, candidate_rK: Tensor) -> Tensor:
        weight_VD = self.frozen_head.weight_VD
        products_rK = torch.einsum("rd,rkd->rk", hidden_rD.to(weight_VD.dtype), weight_VD[candidate_rK])
        return self.frozen_head.transform(upcast(products_rK))
