"""Inputs and outputs of the kernels, shared by all implementations.

Shapes: Q query rows, T packed tokens, A ancestors, P rows of draft blocks; S TTT steps, R rows with
loss, N slots, C chunks of slots, D hidden size, U draft vocabulary, V target vocabulary, r rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class AttentionRows:
    """The keys that each row sees: a causal prefix of its document, and its ancestors.

    position_Q: int64 [Q], ascending; position of each row among the keys of the prefix. A row sees
        keys up to and including its position.
    cu_seqlens: int [num_documents + 1], starts of the documents among those keys, then their total.
    ancestors: A tensors int64 [Q]; row `r` sees row `ancestors[a][r]` of the `a`-th extra keys.
    is_tree: whether rows may share an ancestor or lack one (a negative index); otherwise the
        indices of each `a` are distinct and not negative.
    is_dense: whether the rows of each document are known to have successive positions.
    longest: tokens of the longest document; None = not known on the host.
    """

    position_Q: torch.Tensor
    cu_seqlens: torch.Tensor
    ancestors: tuple[torch.Tensor, ...] = ()
    is_tree: bool = False
    is_dense: bool = False
    longest: int | None = None

    @cached_property
    def start_Q(self) -> torch.Tensor:
        """Start of each row's document, int64 [Q]."""
        starts = self.cu_seqlens.long()
        return starts[torch.searchsorted(starts, self.position_Q, right=True) - 1]


@dataclass(frozen=True)
class BlockRows:
    """The keys that each row of a draft block sees: a range of context tokens, and a range of rows of its block.

    Ranges are half-open, int64 [Q]. A row sees its own key, so its range of rows is never empty; its
    range of context tokens may be. Rows are ordered so that `context_end_Q` and `own_begin_Q` of
    their blocks never decrease.

    context_begin_Q, context_end_Q: range of the context's keys.
    own_begin_Q, own_end_Q: range of the keys of the blocks' rows.
    """

    context_begin_Q: torch.Tensor
    context_end_Q: torch.Tensor
    own_begin_Q: torch.Tensor
    own_end_Q: torch.Tensor

    def picked(self, index_R: torch.Tensor) -> "BlockRows":
        """Return what some of the rows see. index_R: int64 [R], ascending."""
        return BlockRows(*self.bounds_4Q[:, index_R].unbind())

    @cached_property
    def bounds_4Q(self) -> torch.Tensor:
        """All ranges, int64 [4, Q]: begin and end of the context's, begin and end of the blocks'."""
        return torch.stack((self.context_begin_Q, self.context_end_Q, self.own_begin_Q, self.own_end_Q))

    @cached_property
    def most_4Q(self) -> torch.Tensor:
        """Greatest bound of each row and the rows before it, int64 [4, Q], in the order of `bounds_4Q`."""
        return self.bounds_4Q.cummax(1).values

    @cached_property
    def least_4Q(self) -> torch.Tensor:
        """Least bound of each row and the rows after it, int64 [4, Q], in the order of `bounds_4Q`."""
        return self.bounds_4Q.flip(1).cummin(1).values.flip(1)


@dataclass(frozen=True)
class SlotTargets:
    """The target distribution of each slot, shared by the rows of several TTT steps.

    hidden_ND: [N, D], the target's last hidden states.
    logits: maps hidden states [n, D] to the target's logits over the draft vocabulary, fp32 [n, U].
    lse_N: fp32 [N], log-sum-exp of the target's logits over its full vocabulary.
    draft_id_N: int64 [N], draft id of the target's most likely token; meaningful only if that token
        is in the draft vocabulary.
    """

    hidden_ND: torch.Tensor
    logits: Callable[[torch.Tensor], torch.Tensor]
    lse_N: torch.Tensor
    draft_id_N: torch.Tensor


@dataclass(frozen=True)
class SlotDistributions:
    """The target's distribution over all tokens at each slot, shared by several rows.

    hidden_ND: [N, D], the target's last hidden states.
    logits: maps hidden states [n, D] to the target's logits, fp32 [n, V].
    """

    hidden_ND: torch.Tensor
    logits: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TokenTerms:
    """Weights of the parts of a row's loss against a token and against the target's distribution.

    cross_entropy: of -log q[label]. kl: of the KL divergence sum_v p[v] log(p[v] / q[v]).
    total_variation: of sum_v |p[v] - q[v]| / 2.
    """

    cross_entropy: float = 1.0
    kl: float = 0.0
    total_variation: float = 0.0

    @property
    def need_target(self) -> bool:
        """Whether a part needs the target's distribution."""
        return self.kl != 0 or self.total_variation != 0


@dataclass(frozen=True)
class LogitBias:
    """A bias of low rank that is added to the logits of each row, `factor @ weight.T`.

    factor_Rr: [R, r], of each row. weight_Vr: [V, r]. Both may be trained.
    """

    factor_Rr: torch.Tensor
    weight_Vr: torch.Tensor


@dataclass(frozen=True)
class TokenRows:
    """What the rows learn.

    label_R: int64 [R], token of each row; None = the target's most likely token at its slot.
    slot_R: int64 [R], index of each row's slot in `SlotDistributions`; None = no target distributions.
    weigh: maps the cross-entropy of each row, fp32 [R], to the weight of its loss, fp32 [R].
    has_fixed_weights: whether the weights do not depend on the cross-entropy.
    host_slot_R: copy of `slot_R` on the CPU; None = copied when it is needed, which waits for the device.
    top_k: number of tokens with the highest logits before the bias to return for each row; 0 = none.
    """

    label_R: torch.Tensor | None
    slot_R: torch.Tensor | None
    weigh: Callable[[torch.Tensor], torch.Tensor]
    has_fixed_weights: bool = False
    host_slot_R: torch.Tensor | None = None
    top_k: int = 0

    @cached_property
    def slots_on_host(self) -> torch.Tensor:
        """Index of each row's slot, int64 [R] on the CPU."""
        assert self.slot_R is not None, "rows with targets have slots"
        return self.slot_R.cpu() if self.host_slot_R is None else self.host_slot_R


@dataclass(frozen=True)
class TokenLoss:
    """The weighted sum of the losses of all rows, and statistics of each row.

    total: differentiable scalar. The others are not differentiable, fp32 [R].
    weight_R: weight of each row. cross_entropy_R: -log q[label] in nats.
    correct_R: 1 where no token is more likely under q than the target's most likely one, or than the
        label without target distributions.
    kl_R, total_variation_R: as in `TokenTerms`; None without target distributions.
    best_RK: int64 [R, K], the tokens with the highest logits before the bias, highest first; None if none were asked for.
    """

    total: torch.Tensor
    weight_R: torch.Tensor
    cross_entropy_R: torch.Tensor
    correct_R: torch.Tensor
    kl_R: torch.Tensor | None = None
    total_variation_R: torch.Tensor | None = None
    best_RK: torch.Tensor | None = None


@dataclass(frozen=True)
class LossRows:
    """Rows with loss, ordered by TTT step, then by slot.

    slot_R: int64 [R], index of each row's slot.
    bounds: S lists of C + 1 row numbers. The rows of step `i` with a slot in chunk `c` are
        `bounds[i][c]` up to, not including, `bounds[i][c + 1]`.
    slots_per_chunk: chunk `c` begins at slot `c * slots_per_chunk`.
    """

    slot_R: torch.Tensor
    bounds: list[list[int]]
    slots_per_chunk: int


# Takes the target's probabilities p and the draft's log-probabilities log q of k rows, both fp32
# [k, U]. Returns the loss of each row, [k], and its derivative with respect to q, [k, U].
RowScore = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class RowWeights:
    """Weights of the parts of a row's loss, fp32 [S], one per TTT step. None = the part is absent.

    cross_entropy_S: of the cross-entropy. log_acceptance_S: of -log(acceptance).
    rejection_S: of 1 - acceptance. score_S: of `score`.
    score: a part that the fused statistics do not express; it is evaluated in plain PyTorch.
    """

    cross_entropy_S: torch.Tensor
    log_acceptance_S: torch.Tensor | None = None
    rejection_S: torch.Tensor | None = None
    score_S: torch.Tensor | None = None
    score: RowScore | None = None

    @property
    def is_cross_entropy(self) -> bool:
        """Whether cross-entropy is the only fused part."""
        return self.log_acceptance_S is None and self.rejection_S is None

    def stacked(self) -> torch.Tensor:
        """Return the weights of the fused parts, [3, S], or with those of the score, [4, S]; 0 if a part is absent."""
        absent_S = torch.zeros_like(self.cross_entropy_S)
        parts = [self.cross_entropy_S]
        for part_S in (self.log_acceptance_S, self.rejection_S):
            parts.append(absent_S if part_S is None else part_S)
        if self.score_S is not None:
            parts.append(self.score_S)
        return torch.stack(parts)

    def scaled(self, factor_S: torch.Tensor) -> "RowWeights":
        """Return these weights times a factor per step."""

        def times(part_S: torch.Tensor | None) -> torch.Tensor | None:
            return None if part_S is None else part_S * factor_S

        return RowWeights(
            self.cross_entropy_S * factor_S,
            times(self.log_acceptance_S),
            times(self.rejection_S),
            times(self.score_S),
            self.score,
        )


@dataclass(frozen=True)
class LogitTransform:
    """Transform of a target's raw logits before the softmax.

    The fields apply in this order. scale: factor. soft_cap: cap of the magnitude by tanh; None = no
    cap. temperature: divisor.
    """

    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the transformed logits, in their own precision."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits if self.temperature == 1.0 else logits / self.temperature


@dataclass(frozen=True)
class FrozenHead:
    """An LM head that is not trained. weight_VD: [V, D]. transform: from its products to logits."""

    weight_VD: torch.Tensor
    transform: LogitTransform = LogitTransform()


@dataclass(frozen=True)
class TokenTargets:
    """Target distributions that the rows of a chunk learn.

    logits_nV: the target's logits of n slots, fp32 or 16-bit.
    slot_r: int64, index of each row's slot. token_n: int64, most likely token of each slot.
    """

    logits_nV: torch.Tensor
    slot_r: torch.Tensor
    token_n: torch.Tensor


@dataclass(frozen=True)
class TokenChunk:
    """A chunk of r rows that are scored together. Its logits are `transform(logits_rV) + bias_rV`.

    logits_rV: products of the rows and the head, in the precision of the head.
    bias_rV: in the precision of the bias; None = there is none, or `logits_rV` contains it.
    label_r: int64, token of each row.
    """

    logits_rV: torch.Tensor
    bias_rV: torch.Tensor | None
    transform: LogitTransform
    label_r: torch.Tensor
    targets: TokenTargets | None
    terms: TokenTerms


@dataclass(frozen=True)
class LossChunk:
    """A chunk of r rows that are scored together, and the n slots that they learn.

    logits_rU: the draft's logits, in its precision.
    target_nU: the target's logits over the draft vocabulary, fp32 or 16-bit.
    slot_r: int64, index of each row's slot. Rows are ordered by step, then by slot. Padding rows
        with a negative slot come last and contribute nothing.
    lse_n, draft_id_n: as in `SlotTargets`.
    weight_xr: fp32, weights of cross-entropy, -log(acceptance) and 1 - acceptance, 0 if absent, and
        of the score in a fourth line if there is one.
    sizes: number of rows of each step.
    mixes: whether the second and third weight may be nonzero.
    score: a further part of the loss; None = absent.
    """

    logits_rU: torch.Tensor
    target_nU: torch.Tensor
    slot_r: torch.Tensor
    lse_n: torch.Tensor
    draft_id_n: torch.Tensor
    weight_xr: torch.Tensor
    sizes: list[int]
    mixes: bool
    score: RowScore | None = None


@dataclass(frozen=True)
class VocabLoss:
    """The weighted loss of all rows, and statistics summed over the rows of each step, fp32 [S].

    total: differentiable fp32 scalar. The sums are not differentiable.
    cross_entropy_S: -sum_v p[v] log q[v] in nats, with p the target's and q the draft's softmax
        over the draft vocabulary.
    log_acceptance_S: -log of the acceptance.
    acceptance_S: sum_v min(p_full[v], q[v]), with p_full the target's probabilities under its full
        vocabulary.
    correct_S: number of rows in which no token is more likely under q than the target's most likely
        one.
    score_S: sum of `RowWeights.score`, if there is one.
    """

    total: torch.Tensor
    cross_entropy_S: torch.Tensor
    log_acceptance_S: torch.Tensor
    acceptance_S: torch.Tensor
    correct_S: torch.Tensor
    score_S: torch.Tensor | None = None

    @property
    def sums(self) -> tuple[torch.Tensor, ...]:
        fused = (self.cross_entropy_S, self.log_acceptance_S, self.acceptance_S, self.correct_S)
        return fused if self.score_S is None else (*fused, self.score_S)

    def per_step(self, weights: RowWeights, num_rows_S: torch.Tensor) -> torch.Tensor:
        """Return what the rows of each step contribute to the total under these weights, fp32 [S].

        num_rows_S: number of rows with loss of each step.
        """
        loss_S = weights.cross_entropy_S * self.cross_entropy_S
        if weights.log_acceptance_S is not None:
            loss_S = loss_S + weights.log_acceptance_S * self.log_acceptance_S
        if weights.rejection_S is not None:
            loss_S = loss_S + weights.rejection_S * (num_rows_S - self.acceptance_S)
        if weights.score_S is not None:
            assert self.score_S is not None
            loss_S = loss_S + weights.score_S * self.score_S
        return loss_S
