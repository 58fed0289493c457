"""DFlash2 as a draft method. Source: inco.ai's description of DFlash2 and the servers' code."""

from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from engine.config.block_sections import AUTOMODEL, NO_PARITY, SPECULATORS
from engine.config.sections import Config
from engine.config.strict import ConfigError
from engine.kernels import FrozenHead, TokenTerms
from engine.kernels.interface import LogitTransform
from engine.models.block_drafter.block_costs import BlockCounts
from engine.models.block_drafter.block_memory import OwnStates
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.block_drafter.served_block import ServedBlock
from engine.models.costs import Cost, StepPart, map_part
from engine.models.dflash2.dflash2_draft import DFlash2Config, DFlash2Draft, DFlash2Objective
from engine.models.dflash2.served_dflash2 import ServedDFlash2
from engine.models.target_families import final_logits
from engine.parallel.objective import DivisorScope


class DFlash2(BlockMethod[DFlash2Config, DFlash2Draft]):
    """A DFlash block whose rows are mixed by convolutions, and whose tokens a selector chooses."""

    title = "DFlash2"
    unread: ClassVar[tuple[str, ...]] = (
        *BlockMethod.unread,
        "block.markov_head",
        "block.markov_rank",
        "block.confidence_head",
        "objective.confidence",
        "evaluation.min_confidence",
    )
    config_type = DFlash2Config
    draft_type = DFlash2Draft
    default_size = 16
    row_tables = ("predecessor_codebook", "successor_codebook")
    dpace_parities = (NO_PARITY, SPECULATORS)

    def __init__(self, recipe: Config) -> None:
        super().__init__(recipe)
        if self.divides_by_covered and self.rule.scope is not DivisorScope.MICRO_BATCH:
            problem = "is known only after the forward pass, so the gradient would depend on how the batch is divided; use same"
            raise ConfigError(problem, key="objective.selector_normaliser", value="covered")

    @property
    def num_predictions(self) -> int:
        return self.block_size - 1

    @property
    def divides_by_covered(self) -> bool:
        """Whether the selector's loss is divided by the weights of its own rows."""
        normaliser = self.section.selector_normaliser
        return self.section.parity == AUTOMODEL if normaliser is None else normaliser == "covered"

    @property
    def injects(self) -> bool:
        """Whether a label that is no candidate replaces the weakest candidate."""
        injects = self.section.selector_inject
        return self.section.parity == SPECULATORS if injects is None else injects

    def default_terms(self) -> TokenTerms:
        if self.section.parity == SPECULATORS:
            return TokenTerms(cross_entropy=0.0, kl=1.0)
        return super().default_terms()

    @property
    def needs_head_stats(self) -> bool:
        return self.rule.uses_argmax  # the selector learns the labels too

    def mixed_rows(self, config: DFlash2Config) -> int:
        return config.conv_taps

    def own_shapes(self, target_config: PreTrainedConfig) -> dict[str, Any]:
        block = self.block
        transform = final_logits(target_config)
        is_plain = transform.scale == 1 and transform.soft_cap is None
        if self.section.parity in (AUTOMODEL, SPECULATORS) and not is_plain:
            problem = "leaves out the scale and the soft cap of this target's logits, which servers apply; use another"
            raise ConfigError(problem, key="objective.parity", value=self.section.parity)
        return {
            "conv_taps": block.conv_taps,
            "conv_group": block.conv_group,
            "selector_rank": block.selector_rank,
            "selector_top_k": block.selector_top_k,
            "output_multiplier": transform.scale,
            "soft_cap": transform.soft_cap,
        }

    def freeze(self, draft: DFlash2Draft) -> None:
        if not self.section.selector:
            draft.candidate_selector.requires_grad_(False)

    def own_parts(self, config: DFlash2Config, counts: BlockCounts) -> dict[str, StepPart]:
        size = config.hidden_size
        num_kernels = 2 * config.conv_taps * size // config.conv_group
        # The first attention's kernels depend on the anchor's token, or on the mask token.
        rows_of_convolutions = [counts.num_rows] * (2 * config.num_hidden_layers)
        rows_of_convolutions[0] = counts.num_blocks + 1
        rows_of_convolutions[-1] = counts.last_layer_rows(config.conv_taps)
        convolutions = StepPart(Cost())
        for num_rows in rows_of_convolutions:
            convolutions += map_part(num_rows, size, size * num_kernels, num_kernels)
        if not self.section.selector:
            return {"convolutions": convolutions}
        # Which tokens are candidates is found while the loss of all tokens is computed.
        num_candidates = counts.num_loss_rows * config.selector_top_k
        rank = config.selector_rank
        logits = StepPart(Cost(2 * num_candidates * size, num_candidates * size), Cost(2 * num_candidates * size))
        scores = StepPart(Cost(2 * num_candidates * rank, num_candidates * rank), Cost(4 * num_candidates * rank))
        state = map_part(counts.num_loss_rows, size, size * rank, rank)
        return {"convolutions": convolutions, "candidates": logits + scores, "selector": state}

    def own_states(self, config: DFlash2Config) -> OwnStates:
        size = config.hidden_size
        kernels = config.conv_taps * size // config.conv_group
        head = 0
        head_passing = 0
        if self.section.selector:
            rank = config.selector_rank
            top_k = config.selector_top_k
            # Final state, three vectors of the selector, the candidates' vectors, and three numbers per candidate.
            head = size + 3 * rank + top_k * (rank + 3)
            head_passing = top_k * size
        return OwnStates(
            # Mixed rows, and the kernels of both sides.
            before_attention=size + 2 * kernels,
            # Rows before they are mixed, and a copy of their kernels.
            after_attention=size + kernels,
            around_mlp=2 * size + 2 * kernels,
            head=head,
            head_passing=head_passing,
        )

    def objective_of(self, **shared: Any) -> DFlash2Objective:
        section = self.section
        return DFlash2Objective(
            **shared,
            top_k=self.block.selector_top_k,
            selector=section.selector,
            injects=self.injects,
            divides_by_covered=self.divides_by_covered,
        )

    def logit_transform(self, head: Any) -> LogitTransform:
        return LogitTransform(head.scale, head.soft_cap)

    def logit_transform_of(self, config: DFlash2Config) -> LogitTransform:
        return LogitTransform(config.output_multiplier, config.soft_cap)

    def served(self, model: DFlash2Draft, embed_weight_VD: Tensor, head: FrozenHead) -> ServedBlock:
        return ServedDFlash2(model, embed_weight_VD, head)
