"""Training-time test: the draft unrolled on its own outputs, and the loss of every row.

Row `(t, i)` is position `t` at step `i`. It reads the token `x[t+1+i]` and the output of row `(t, i-1)`, stands at rotary
position `t + i`, attends to keys `(s, 0)`, `s <= t`, of its document and to `(t, 1..i)`, and learns slot `u = t + 1 + i`.
Source: EAGLE-3 (arXiv:2503.01840), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from engine.batch import DraftOutput, LossNorms, MicroBatch
from engine.config import LossSection, TttSection
from engine.kernels import RowWeights, SlotTargets, vocab_loss
from engine.kernels.rows import take_rows
from engine.models.eagle3 import Eagle3Draft, LayerKeys
from engine.models.vocab_map import VocabMap
from engine.rows import RowPlan, allowed_rows, loss_rows, plan_rows, row_slots


@dataclass(frozen=True)
class Teacher:
    """What the draft is compared with.

    logits: the target's head restricted to the draft vocabulary, last hidden states [Q, D] -> fp32 [Q, U].
    """

    logits: Callable[[torch.Tensor], torch.Tensor]
    vocab_map: VocabMap


def unroll(draft: Eagle3Draft, micro: MicroBatch, steps: int, plan: RowPlan | None = None) -> list[torch.Tensor]:
    """Pre-norm outputs [Q, D] of the rows of every step that `plan` lets run; of all, [T, D], without a plan."""
    batch, kept = micro.batch, plan.kept if plan else [None] * steps
    position_T, row_T = batch.position_T, torch.arange(batch.num_tokens, device=micro.embed_TD.device)
    embed_TD = torch.nn.functional.pad(draft.embed(micro.embed_TD), (0, 0, 0, steps))
    keys = [LayerKeys(row_T, batch.cu_seqlens) for _ in draft.decoder_layers]
    row_Q = row_T if kept[0] is None else kept[0]
    keys[-1].query_index_Q = row_Q  # layers below the last run step 0 densely: the next one needs all their outputs
    outputs = [draft.step(embed_TD[1 : 1 + batch.num_tokens], draft.fuse(micro.target.aux_TA), position_T, keys, kept[0])]
    for below in keys[:-1]:
        below.query_index_Q = row_Q
    for step in range(1, steps):
        state_QD = draft.next_state(outputs[-1])
        if kept[step] is not None:
            state_QD, row_Q = take_rows(state_QD, kept[step]), row_Q[kept[step]]
            for layer_keys in keys:
                layer_keys.keep(kept[step])
        outputs.append(draft.step(take_rows(embed_TD, row_Q + 1 + step), state_QD, position_T[row_Q] + step, keys))
    return outputs


@dataclass(frozen=True)
class TrainingTimeTest:
    """The loss of a draft on a micro-batch: which rows count, what they learn, how they are weighed."""

    ttt: TttSection
    loss: LossSection
    teacher: Teacher

    @property
    def step_weights(self) -> list[float]:
        """Weight of each TTT step in the total loss."""
        return list(self.loss.step_weights or (self.loss.step_decay**step for step in range(self.ttt.steps)))

    @cached_property
    def slots_per_chunk(self) -> int:
        """Slots whose rows' logits and gradients, in fp32 and twice in all, fit `loss.chunk_mb`."""
        bytes_per_slot = 4 * self.teacher.vocab_map.size * (2 * self.ttt.steps + 2)
        return max(1, self.loss.chunk_mb * 2**20 // bytes_per_slot)

    def __call__(self, draft: Eagle3Draft, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        """Loss and counts of each TTT step."""
        target, vocab_map = micro.target, self.teacher.vocab_map
        allowed_ST = allowed_rows(micro.batch, self.ttt)
        carries_loss_ST = loss_rows(allowed_ST, target, vocab_map)
        slot_ST = row_slots(target.slots_N, allowed_ST)
        plan = plan_rows(carries_loss_ST, slot_ST, self.slots_per_chunk, self.ttt.compaction)
        outputs = unroll(draft, micro, self.ttt.steps, plan)
        hidden_RD = draft.norm(torch.cat([take_rows(*rows) for rows in zip(outputs, plan.loss_rows, strict=True)]))
        slots = SlotTargets(target.last_hidden_ND, self.teacher.logits, target.lse_N, vocab_map.draft_ids(target.argmax_N))
        acceptance_S = norms.acceptance_S
        if self.loss.kind == "lk_lambda" and acceptance_S is None:
            with torch.no_grad():  # a walk ahead, for the mean over the micro-batch
                ahead = vocab_loss(hidden_RD, draft.lm_head.weight, plan.loss, slots, RowWeights(norms.loss_rows_S))
            acceptance_S = ahead.acceptance_S / norms.loss_rows_S.clamp_min(1)
        parts = self._row_weights(norms, acceptance_S)
        weight_S = parts.cross_entropy_S.new_tensor(self.step_weights)
        result = vocab_loss(hidden_RD, draft.lm_head.weight, plan.loss, slots, parts.scaled(weight_S))
        num_loss_rows_S = carries_loss_ST.sum(1)
        return DraftOutput(
            loss=result.total,
            loss_S=result.per_step(parts, num_loss_rows_S),
            num_loss_rows_S=num_loss_rows_S,
            num_allowed_rows_S=allowed_ST.sum(1),
            num_correct_S=result.correct_S,
            accepted_S=result.acceptance_S,
        )

    def _row_weights(self, norms: LossNorms, acceptance_S: torch.Tensor | None) -> RowWeights:
        """Weights before those of the steps. `lk_lambda` mixes KL and 1 - alpha by exp(-decay * mean alpha)."""
        per_slot_S, per_row_S = (1 / norms.slots).expand(self.ttt.steps), 1 / norms.loss_rows_S.clamp_min(1)
        if self.loss.kind == "kl":
            return RowWeights(per_slot_S)
        if self.loss.kind == "lk_alpha":
            return RowWeights(torch.zeros_like(per_slot_S), log_acceptance_S=per_row_S)
        kl_share_S = self.loss.lk_kl_scale * torch.exp(-self.loss.lk_kl_decay * acceptance_S)
        return RowWeights(kl_share_S * per_slot_S, rejection_S=(1 - kl_share_S) * per_row_S)
