"""DSpark as a draft method. Source: DSpark (arXiv:2607.05147)."""

from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from engine.config.block_sections import AUTOMODEL, NO_PARITY, SPECFORGE, SPECULATORS
from engine.config.sections import Config
from engine.config.strict import ConfigError
from engine.kernels import FrozenHead
from engine.models.block_drafter.block_costs import BlockCounts
from engine.models.block_drafter.block_memory import OwnStates
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.block_drafter.served_block import ServedBlock
from engine.models.costs import StepPart, map_part
from engine.models.dspark.dspark_draft import DSparkConfig, DSparkDraft, DSparkObjective
from engine.models.dspark.markov_head import GATED, RNN
from engine.models.dspark.served_dspark import ServedDSpark
from engine.parallel.objective import DivisorScope


class DSpark(BlockMethod[DSparkConfig, DSparkDraft]):
    """A block of which every row drafts a token, with a head that makes each depend on the one before."""

    title = "DSpark"
    unread: ClassVar[tuple[str, ...]] = (
        *BlockMethod.unread,
        "block.conv_taps",
        "block.conv_group",
        "block.selector_rank",
        "block.selector_top_k",
        "objective.selector",
        "objective.selector_inject",
        "objective.selector_normaliser",
    )
    config_type = DSparkConfig
    draft_type = DSparkDraft
    default_size = 7
    row_tables = ("markov_w1.weight",)
    default_cross_entropy = 0.1
    default_l1 = 0.9
    scopes = BlockMethod.scopes | {SPECFORGE: DivisorScope.RANKS, AUTOMODEL: DivisorScope.RANKS}
    dpace_parities = (NO_PARITY, SPECULATORS)

    def __init__(self, recipe: Config) -> None:
        super().__init__(recipe)
        if self.section.parity == SPECULATORS and self.block.markov_head == RNN:
            problem = "lets rows learn behind gaps, over which block.markov_head = rnn cannot run; use another head or parity"
            raise ConfigError(problem, key="objective.parity", value=SPECULATORS)
        if recipe.evaluation.min_confidence and not self.has_confidence:
            problem = "needs a trained confidence head; set block.confidence_head=true and objective.confidence above 0"
            raise ConfigError(problem, key="evaluation.min_confidence", value=recipe.evaluation.min_confidence)

    @property
    def num_predictions(self) -> int:
        return self.block_size

    @property
    def needs_prefix(self) -> bool:
        return True

    @property
    def reads_decay(self) -> bool:
        keeps_decay = self.section.parity == SPECULATORS and self.has_confidence
        return super().reads_decay or keeps_decay

    @property
    def needs_distribution(self) -> bool:
        return super().needs_distribution or self.has_confidence

    @property
    def has_confidence(self) -> bool:
        """Whether there is a confidence head; one that is not trained would say nothing."""
        return self.block.confidence_head and self.section.confidence > 0

    def own_shapes(self, target_config: PreTrainedConfig) -> dict[str, Any]:
        block = self.block
        return {
            "markov_head": block.markov_head,
            "markov_rank": block.markov_rank,
            "has_confidence": self.has_confidence,
        }

    def own_parts(self, config: DSparkConfig, counts: BlockCounts) -> dict[str, StepPart]:
        rows = counts.num_loss_rows
        rank = config.markov_rank
        return {"markov_head": map_part(rows, rank, rank * config.vocab_size, 0)}

    def own_states(self, config: DSparkConfig) -> OwnStates:
        size = config.hidden_size
        rank = config.markov_rank
        # Gradient of the bias's factor; then what the factor is made of.
        head = rank
        if config.markov_head == GATED:
            head += size + 3 * rank
        if config.markov_head == RNN:
            head += size + 8 * rank
        if config.has_confidence:
            head += size + (rank if config.confidence_reads_markov else 0)
        return OwnStates(head=head, head_weights=config.vocab_size * rank, has_bias=True)

    def count_read_weights(self, config: DSparkConfig) -> int:
        # The Markov head is read again for each token after the first.
        return super().count_read_weights(config) + (config.num_predictions - 1) * config.vocab_size * config.markov_rank

    def objective_of(self, **shared: Any) -> DSparkObjective:
        return DSparkObjective(**shared, confidence=self.section.confidence if self.has_confidence else 0.0)

    def served(self, model: DSparkDraft, embed_weight_VD: Tensor, head: FrozenHead) -> ServedBlock:
        return ServedDSpark(model, embed_weight_VD, head, self.recipe.evaluation.min_confidence)
