"""Training-time test: the draft unrolled on its own outputs, and the loss of every row.

Row `(t, i)` is position `t` at step `i`. It reads the token `x[t+1+i]` and the output of row
`(t, i-1)`, and has rotary position `t + i`. It attends to keys `(s, 0)`, `s <= t`, of its document
and to `(t, 1..i)`, and it learns slot `u = t + 1 + i`.
Source: EAGLE-3 (arXiv:2503.01840), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from engine.batch import DraftOutput, LossNorms, MicroBatch
from engine.config.sections import CHUNK_MB, LossSection, TttSection
from engine.kernels import RowWeights, SlotTargets
from engine.kernels.recompute import recomputed_if
from engine.kernels.row_index import take_rows
from engine.kernels.vocab_loss import LossPass
from engine.models.eagle3.draft import Eagle3Draft, LayerKeys
from engine.models.eagle3.row_plan import RowPlan, plan_rows
from engine.models.losses.distillation_loss import DistillationLoss
from engine.models.losses.loss_registry import make_loss
from engine.models.training_rows import loss_rows, row_slots
from engine.models.vocab_map import VocabMap
from engine.parallel.objective import DivisorScope


@dataclass(frozen=True)
class Teacher:
    """The target's head and the draft vocabulary, with which the draft's logits are compared.

    logits: the target's head restricted to the draft vocabulary, last hidden states [Q, D] -> fp32 [Q, U].
    """

    logits: Callable[[torch.Tensor], torch.Tensor]
    vocab_map: VocabMap


def unroll(draft: Eagle3Draft, micro: MicroBatch, steps: int, plan: RowPlan | None = None) -> list[torch.Tensor]:
    """Compute the pre-norm outputs of every step.

    Outputs are [Q, D] for the rows that run according to `plan`, or [T, D] without a plan.
    """
    batch = micro.batch
    kept: list[torch.Tensor | None] = [None] * steps
    is_dense = [True] * steps
    if plan is not None:
        kept = plan.kept
        is_dense = plan.is_dense
    position_T = batch.position_T
    row_T = torch.arange(batch.num_tokens, device=micro.embed_TD.device)
    embed_TD = torch.nn.functional.pad(draft.embed(micro.embed_TD), (0, 0, 0, steps))

    def first(state_TD: torch.Tensor, keys: list[LayerKeys]) -> tuple[torch.Tensor, list[LayerKeys]]:
        return draft.step(embed_TD[1 : 1 + batch.num_tokens], state_TD, position_T, keys, kept[0])

    def later(step: int, output_QD: torch.Tensor, row_Q: torch.Tensor, keys: list[LayerKeys]):
        index_Q = kept[step]
        state_QD = draft.next_state(output_QD if index_Q is None else take_rows(output_QD, index_Q))
        return draft.step(take_rows(embed_TD, row_Q + 1 + step), state_QD, position_T[row_Q] + step, keys)

    run = recomputed_if(draft.kernels.recompute == "step")
    first_kept = kept[0]
    row_Q = row_T if first_kept is None else first_kept
    longest = max(batch.host_lengths, default=None)
    every_T = LayerKeys(row_T, batch.cu_seqlens, is_dense=True, longest=longest)
    own_Q = replace(every_T, position_Q=row_Q, is_dense=is_dense[0])
    # Layers below the last run step 0 for every token: the next layer needs all their outputs.
    keys = [every_T] * (len(draft.decoder_layers) - 1) + [own_Q]
    output_QD, keys = run(first, draft.fuse(micro.target.aux_TA), keys)
    keys = [replace(layer_keys, position_Q=row_Q, is_dense=is_dense[0]) for layer_keys in keys]
    outputs = [output_QD]
    for step in range(1, steps):
        index_Q = kept[step]
        if index_Q is not None:
            row_Q = row_Q[index_Q]
            keys = [layer_keys.kept(index_Q, is_dense[step]) for layer_keys in keys]
        output_QD, keys = run(later, step, output_QD, row_Q, keys)
        outputs.append(output_QD)
    return outputs


@dataclass(frozen=True)
class TrainingTimeTest:
    """The loss of a draft on a micro-batch: which rows count, what they learn and their weights.

    slots_per_chunk: slots per chunk of the vocabulary loss; None = as many as fit `loss.chunk_mb`.
    """

    ttt: TttSection
    loss: LossSection
    teacher: Teacher
    slots_per_chunk: int | None = None

    @property
    def num_steps(self) -> int:
        """Number of TTT steps."""
        return self.ttt.steps

    @property
    def step_weights(self) -> list[float]:
        """Weight of each TTT step in the total loss."""
        return list(self.loss.step_weights or (self.loss.step_decay**step for step in range(self.ttt.steps)))

    @cached_property
    def distillation(self) -> DistillationLoss:
        """The loss that `loss.kind` selects."""
        return make_loss(self.loss)

    @property
    def divisor_scope(self) -> DivisorScope:
        return DivisorScope.GLOBAL_BATCH if self.loss.normaliser == "slots" else DivisorScope.MICRO_BATCH

    @property
    def needs_acceptance(self) -> bool:
        return self.distillation.needs_acceptance

    def count_loss_rows(self, micro: MicroBatch) -> torch.Tensor:
        """Return the number of rows with loss of each TTT step, fp32 [S]."""
        return loss_rows(micro.allowed_ST, micro.target, self.teacher.vocab_map).sum(1).float()

    def loss_share(self, micro: MicroBatch) -> int | torch.Tensor:
        """Return the slots of a micro-batch, or its positions, whichever the loss is divided by."""
        return micro.num_slots if self.loss.normaliser == "slots" else micro.num_tokens

    def logits(self, draft: Eagle3Draft, micro: MicroBatch) -> list[torch.Tensor]:
        """Compute the draft's logits of every row: [T, U] for each TTT step."""
        return [draft.logits(output_TD) for output_TD in unroll(draft, micro, self.ttt.steps)]

    @cached_property
    def _weight_S(self) -> torch.Tensor:
        return torch.tensor(self.step_weights, device=self.teacher.vocab_map.in_draft_V.device)

    def __call__(self, draft: Eagle3Draft, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        """Compute the loss and the counts of each TTT step."""
        target = micro.target
        allowed_ST = micro.allowed_ST
        vocab_map = self.teacher.vocab_map
        carries_loss_ST = loss_rows(allowed_ST, target, vocab_map)
        slot_ST = row_slots(target.slots_N, allowed_ST)
        chunk = self.slots_per_chunk or self.slots_within_budget(draft.kernels.loss_pass, draft.lm_head.weight.dtype)
        plan = plan_rows(carries_loss_ST, slot_ST, micro.batch.cu_seqlens, chunk, self.ttt.compaction)
        outputs = unroll(draft, micro, self.ttt.steps, plan)
        hidden_RD = draft.norm(torch.cat([take_rows(*rows) for rows in zip(outputs, plan.loss_rows, strict=True)]))
        kernels = draft.kernels
        weight_UD = draft.lm_head.weight
        argmax_N, lse_N = target.head_stats
        slots = SlotTargets(target.last_hidden_ND, self.teacher.logits, lse_N, vocab_map.draft_ids(argmax_N))
        acceptance_S = norms.acceptance_S
        if self.needs_acceptance and acceptance_S is None:
            with torch.no_grad():  # extra pass for the mean acceptance rate of the micro-batch
                nothing = RowWeights(torch.zeros_like(norms.loss_rows_S))
                ahead = kernels.vocab_loss(hidden_RD, weight_UD, plan.loss, slots, nothing, kernels.loss_pass)
            acceptance_S = ahead.acceptance_S / norms.loss_rows_S.clamp_min(1)
        parts = self.distillation.weights(norms, acceptance_S)
        result = kernels.vocab_loss(hidden_RD, weight_UD, plan.loss, slots, parts.scaled(self._weight_S), kernels.loss_pass)
        num_loss_rows_S = carries_loss_ST.sum(1)
        return DraftOutput(
            loss=result.total,
            loss_S=result.per_step(parts, num_loss_rows_S),
            num_loss_rows_S=num_loss_rows_S,
            num_allowed_rows_S=allowed_ST.sum(1),
            num_correct_S=result.correct_S,
            accepted_S=result.acceptance_S,
        )

    def slots_within_budget(self, loss_pass: LossPass, dtype: torch.dtype) -> int:
        """Return the number of slots for which the logits of all steps fit into `loss.chunk_mb`."""
        chunk_mb = self.loss.chunk_mb or CHUNK_MB[self.teacher.vocab_map.in_draft_V.device.type]
        loss_pass = loss_pass.for_score(self.distillation.score)
        return max(1, chunk_mb * 2**20 // loss_pass.bytes_per_slot(self.ttt.steps, self.teacher.vocab_map.size, dtype))
