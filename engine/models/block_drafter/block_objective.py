"""What block drafters learn: the loss of the rows of a micro-batch's blocks.

A row that predicts the token at slot `u` learns its label, `x[u + 1]` or the target's most likely
token, and the target's distribution at `u`, in the proportions that the recipe gives. A method adds
to it: a bias of the logits that depends on the token before (DSpark's Markov head), and losses of
its own heads.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from engine.batch import DraftOutput, LossNorms, MicroBatch
from engine.config.sections import CHUNK_MB
from engine.kernels import FrozenHead, LogitBias, SlotDistributions, TokenLoss, TokenRows, TokenTerms
from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_probe import probe_logits
from engine.models.block_drafter.block_rows import BlockPlan, BlockShape, plan_blocks
from engine.models.draft_method import TargetRows
from engine.parallel.objective import DivisorScope


@dataclass(frozen=True)
class BlockLossRule:
    """How the losses of rows are weighted and divided.

    terms: weights of the parts of a row's loss.
    uses_argmax: whether the label is the target's most likely token instead of the token in the data.
    decay: row `i` has weight exp(-i / decay); 0 = all have weight 1.
    dpace_alpha: of D-PACE, which replaces the decay; None = decay.
    divisor: "weights" = sum of the weights, "rows" = number of rows, "documents" = number of documents, "one" = 1.
    divisor_offset: is added to the divisor.
    scope: micro-batches whose sum the divisor is. With D-PACE, whose weights are not known before the
        forward pass, "weights" is the number of rows, unless each micro-batch counts alone.
    separate_heads: whether D-PACE leaves the loss of a confidence head its decay, and weighs that of a
        selector by the selector's own cross-entropy, as speculators does; otherwise both have the rows' weights.
    """

    terms: TokenTerms = field(default_factory=TokenTerms)
    uses_argmax: bool = False
    decay: float = 0.0
    dpace_alpha: float | None = None
    divisor: Literal["weights", "rows", "documents", "one"] = "weights"
    divisor_offset: float = 0.0
    scope: DivisorScope = DivisorScope.GLOBAL_BATCH
    separate_heads: bool = False

    def prediction_weights(self, num_predictions: int) -> list[float]:
        """Return the weight of each prediction of a block; with D-PACE, that before the acceptance estimates."""
        if self.dpace_alpha is not None:
            return [1.0] * num_predictions
        return self.decayed_weights(num_predictions)

    def decayed_weights(self, num_predictions: int) -> list[float]:
        """Return the weight of each prediction of a block that the decay gives it."""
        if not self.decay:
            return [1.0] * num_predictions
        return [math.exp(-index / self.decay) for index in range(num_predictions)]


DraftT = TypeVar("DraftT", bound=BlockDraft)


@dataclass(frozen=True)
class BlockObjective(Generic[DraftT]):
    """The loss of a block drafter on a micro-batch.

    head: the target's LM head over all tokens.
    compaction: whether rows and context tokens that no loss depends on are left out.
    chunk_mb: memory of a chunk of the loss, in MiB; None = the default of the device.
    """

    num_predictions: int
    shape: BlockShape
    rule: BlockLossRule
    head: TargetRows
    frozen_head: FrozenHead
    compaction: bool = True
    chunk_mb: int | None = None

    @property
    def num_steps(self) -> int:
        return self.num_predictions

    @property
    def step_weights(self) -> list[float]:
        return self.rule.prediction_weights(self.num_predictions)

    @property
    def divisor_scope(self) -> DivisorScope:
        return self.rule.scope

    @property
    def needs_acceptance(self) -> bool:
        return False

    @property
    def needs_distribution(self) -> bool:
        """Whether the loss needs the target's distribution at the slots, and not its most likely token alone."""
        return self.rule.terms.need_target

    @property
    def num_candidates(self) -> int:
        """Number of most likely tokens of each row that `head_loss` needs."""
        return 0

    def count_loss_rows(self, micro: MicroBatch) -> Tensor:
        """Return the number of rows with loss of each prediction, fp32 [S]."""
        return micro.allowed_ST.sum(1).float()

    def plan(self, micro: MicroBatch) -> BlockPlan:
        """Return the plan of a micro-batch's blocks."""
        return plan_blocks(micro.batch, micro.allowed_ST, self.shape, self.compaction)

    def hidden_rows(self, draft: DraftT, micro: MicroBatch, plan: BlockPlan) -> Tensor:
        """Compute the final states of the rows with loss, [R, D]."""
        return draft.hidden_rows(micro.target.aux_TA, micro.embed_TD[plan.anchor_N], plan)

    def logits(self, draft: DraftT, micro: MicroBatch) -> list[Tensor]:
        """Compute the logits of some blocks spread over the batch: [N, V] for each prediction."""
        return list(probe_logits(draft, self.frozen_head, micro, micro.embed_TD))

    def __call__(self, draft: DraftT, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        """Compute the loss and the counts of each prediction.

        A micro-batch without loss runs the same modules on no rows: ZeRO reduces gradients in the order
        in which they are computed, which therefore has to be the same on all ranks.
        """
        plan = self.plan(micro)
        learned = self.learn(draft, micro, plan, norms.slots + self.rule.divisor_offset)
        return self._output(micro, plan, learned)

    def loss_share(self, micro: MicroBatch) -> int | Tensor:
        """Return what a micro-batch contributes to the divisor: weights or rows, or documents."""
        if self.rule.divisor == "documents":
            return len(micro.batch.host_lengths)
        if self.rule.divisor == "one":
            return 1
        rows_S = self.count_loss_rows(micro)
        if self.rule.divisor == "rows" or self.rule.dpace_alpha is not None:
            return rows_S.sum()
        return (rows_S * self._weight_S.to(rows_S)).sum()

    @cached_property
    def _weight_S(self) -> Tensor:
        return torch.tensor(self.step_weights, dtype=torch.float64)

    def learn(self, draft: DraftT, micro: MicroBatch, plan: BlockPlan, divisor: Tensor) -> "LearnedRows":
        """Compute the loss of a micro-batch's rows. divisor: of their weights, a scalar."""
        rows = self._rows_of(micro, plan)
        hidden_RD = self.hidden_rows(draft, micro, plan)
        bias = self.bias(draft, plan, hidden_RD, rows.previous_R)
        weigh = DividedWeights(self.rule, plan, self.num_predictions, divisor)
        token_pass = replace(draft.kernels.token_pass, chunk_bytes=self.chunk_bytes(hidden_RD))
        tokens = draft.kernels.token_loss(
            hidden_RD,
            self.frozen_head,
            TokenRows(rows.label_R, rows.slot_R, weigh, self.rule.dpace_alpha is None, rows.host_slot_R, self.num_candidates),
            self.rule.terms,
            rows.targets,
            bias,
            token_pass,
        )
        learned = LearnedRows(plan, hidden_RD, rows.label_R, rows.previous_R, tokens, weigh)
        return replace(learned, head=self.head_loss(draft, learned))

    def chunk_bytes(self, like: Tensor) -> int:
        """Return the memory of a chunk of the loss on a tensor's device, in bytes."""
        return (self.chunk_mb or CHUNK_MB[like.device.type]) << 20

    def bias(self, draft: DraftT, plan: BlockPlan, hidden_RD: Tensor, previous_R: Tensor) -> LogitBias | None:
        """Return the bias of the rows' logits that depends on the tokens before; None = the method has none."""
        return None

    def head_loss(self, draft: DraftT, learned: "LearnedRows") -> "HeadLoss | None":
        """Return the loss of the method's own head; None = it has none."""
        return None

    def _rows_of(self, micro: MicroBatch, plan: BlockPlan) -> "_RowTargets":
        ids_T = micro.batch.input_ids_T
        label_R: Tensor | None = ids_T[plan.slot_R + 1]
        target = micro.target
        previous_R = ids_T[plan.slot_R]
        if not self.needs_distribution and not self.rule.uses_argmax:
            return _RowTargets(label_R, previous_R, None, None, None)
        slot_R = torch.searchsorted(target.slots_N, plan.slot_R)
        if self.rule.uses_argmax:
            # Without it, the labels are found among the logits that the distribution is made of.
            label_R = None if target.argmax_N is None else target.argmax_N[slot_R].long()
        if not self.needs_distribution:
            return _RowTargets(label_R, previous_R, slot_R, None, None)
        targets = SlotDistributions(target.last_hidden_ND, self.head.logits)
        # Here the device has little work ahead, since the plan was read from it as well.
        return _RowTargets(label_R, previous_R, slot_R, slot_R.cpu(), targets)

    def _output(self, micro: MicroBatch, plan: BlockPlan, learned: "LearnedRows") -> DraftOutput:
        tokens = learned.tokens
        terms = self.rule.terms
        loss_R = terms.cross_entropy * tokens.cross_entropy_R
        accepted_R = torch.exp(-tokens.cross_entropy_R)
        if tokens.total_variation_R is not None and tokens.kl_R is not None:
            loss_R = loss_R + terms.kl * tokens.kl_R + terms.total_variation * tokens.total_variation_R
            accepted_R = 1 - tokens.total_variation_R
        loss_R = tokens.weight_R * loss_R
        if learned.head is not None:
            loss_R = loss_R + learned.head.weight_R * learned.head.loss_R.detach()
        allowed_ST = micro.allowed_ST
        counts_S = allowed_ST.sum(1)

        def per_prediction(values_R: Tensor) -> Tensor:
            return values_R.new_zeros(self.num_predictions).index_add_(0, plan.prediction_R, values_R)

        loss_S = per_prediction(loss_R)
        return DraftOutput(
            loss=learned.total,
            loss_S=(loss_S / self._weight_S.to(loss_S)).float(),
            num_loss_rows_S=counts_S,
            num_allowed_rows_S=counts_S,
            num_correct_S=per_prediction(tokens.correct_R).float(),
            accepted_S=per_prediction(accepted_R).float(),
        )


@dataclass(frozen=True)
class _RowTargets:
    label_R: Tensor | None
    previous_R: Tensor
    slot_R: Tensor | None
    host_slot_R: Tensor | None
    targets: SlotDistributions | None


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a method's own head for each row. weight_R: weight of each row, already divided."""

    loss_R: Tensor
    weight_R: Tensor

    @property
    def total(self) -> Tensor:
        """The whole loss, differentiable."""
        return (self.weight_R * self.loss_R).sum()


@dataclass(frozen=True)
class LearnedRows:
    """The rows with loss of a micro-batch, with their loss.

    hidden_RD: final states. previous_R: int64, the tokens before.
    label_R: int64, tokens that they learn; None = the target's most likely ones, which only the loss has seen.
    weigh: weights of rows. head: loss of the method's own head; None = there is none.
    """

    plan: BlockPlan
    hidden_RD: Tensor
    label_R: Tensor | None
    previous_R: Tensor
    tokens: TokenLoss
    weigh: "DividedWeights"
    head: HeadLoss | None = None

    @property
    def total(self) -> Tensor:
        """The whole loss, differentiable."""
        if self.head is None:
            return self.tokens.total
        return self.tokens.total + self.head.total


@dataclass(frozen=True)
class DividedWeights:
    """Weights of rows with loss, already divided. Called with the cross-entropy of each row, [R]."""

    rule: BlockLossRule
    plan: BlockPlan
    num_predictions: int
    divisor: Tensor

    def __call__(self, cross_entropy_R: Tensor) -> Tensor:
        rule = self.rule
        if rule.dpace_alpha is None:
            return self.decayed(cross_entropy_R)
        weight_R = dpace_weights(cross_entropy_R, self.plan, self.num_predictions, rule.dpace_alpha)
        if rule.divisor == "weights" and rule.scope is DivisorScope.MICRO_BATCH:
            return self._divided(weight_R, weight_R.sum() + rule.divisor_offset)
        return self._divided(weight_R, self.divisor)

    def decayed(self, like_R: Tensor) -> Tensor:
        """Return the weights that the decay gives the rows, in the precision of another tensor."""
        weights_S = torch.tensor(self.rule.decayed_weights(self.num_predictions), dtype=torch.float64)
        weight_R = weights_S.to(like_R)[self.plan.prediction_R]
        return self._divided(weight_R, self.divisor)

    def _divided(self, weight_R: Tensor, divisor: Tensor) -> Tensor:
        return weight_R / torch.where(divisor > 0, divisor, 1).to(weight_R)


def dpace_weights(cross_entropy_R: Tensor, plan: BlockPlan, num_predictions: int, alpha: float) -> Tensor:
    """Return the D-PACE weight of each row with loss, [R].

    With `q_i` the probability of label `i`, its acceptance is estimated as `(1 - alpha) q_i + alpha`.
    `C_i` is the product of the estimates up to `i`, and the weight of row `i` is the sum of `C_j`, `j >= i`.
    Source: D-PACE (arXiv:2605.18810).
    """
    block_R = plan.block_P[plan.loss_row_R]
    shape = len(plan.anchor_N), num_predictions
    estimate_NS = cross_entropy_R.new_ones(shape)
    estimate_NS[block_R, plan.prediction_R] = (1 - alpha) * torch.exp(-cross_entropy_R) + alpha
    learns_NS = cross_entropy_R.new_zeros(shape)
    learns_NS[block_R, plan.prediction_R] = 1
    reached_NS = estimate_NS.cumprod(1) * learns_NS
    weight_NS = reached_NS.flip(1).cumsum(1).flip(1)
    return weight_NS[block_R, plan.prediction_R]
