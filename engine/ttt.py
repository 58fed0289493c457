"""Training-time test: the draft unrolled on its own outputs, and the loss of every row.

Row `(t, i)` is position `t` at step `i`. It reads the token `x[t+1+i]` and the output of row `(t, i-1)`, stands at rotary
position `t + i`, attends to keys `(s, 0)`, `s <= t`, of its document and to `(t, 1..i)`, and learns slot `u = t + 1 + i`.
Source: EAGLE-3 (arXiv:2503.01840), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.batch import DraftOutput, LossNorms, MicroBatch, PackedBatch, TargetOutput
from engine.config import LossSection, TttSection
from engine.kernels import RowLosses, vocab_loss
from engine.models.eagle3 import Eagle3Draft, LayerKeys
from engine.models.vocab_map import VocabMap


@dataclass(frozen=True)
class Teacher:
    """What the draft is compared with.

    logits: the target's head restricted to the draft vocabulary, last hidden states [Q, D] -> fp32 [Q, U].
    """

    logits: Callable[[torch.Tensor], torch.Tensor]
    vocab_map: VocabMap


def allowed_rows(batch: PackedBatch, ttt: TttSection) -> torch.Tensor:
    """Rows whose slot lies in their document and that the mask allows, bool [S, T].

    `inference`: the assistant wrote all of `t+1 .. u+1`, as when drafting starts from a token the target has just produced.
    `specforge`: the assistant wrote `u-1`.
    """
    mask_T, num_tokens = batch.assistant_mask_T, batch.num_tokens
    end_T = torch.repeat_interleave(batch.cu_seqlens[1:].long(), batch.lengths.long(), output_size=num_tokens)
    position_T = torch.arange(num_tokens, device=mask_T.device)
    assistants_before = torch.nn.functional.pad(mask_T.long().cumsum(0), (1, 0))
    steps = []
    for step in range(ttt.steps):
        slot_T = position_T + 1 + step
        if ttt.mask_alignment == "specforge":
            allowed_T = (slot_T < end_T) & mask_T[(slot_T - 1).clamp_max(num_tokens - 1)]
        else:
            run_T = assistants_before[(slot_T + 2).clamp_max(num_tokens)] - assistants_before[position_T + 1]
            allowed_T = (slot_T + 1 < end_T) & (run_T == step + 2)
        steps.append(allowed_T)
    return torch.stack(steps)


def slots_of(allowed_ST: torch.Tensor) -> torch.Tensor:
    """Positions learned by at least one allowed row, int64 [N] ascending.

    Both alignments allow `(u - 1, 0)` wherever they allow any row of slot `u`, so step 0 names them all.
    """
    return allowed_ST[0].nonzero().flatten() + 1


def row_slots(slots_N: torch.Tensor, allowed_ST: torch.Tensor) -> torch.Tensor:
    """Index into `slots_N` of each row's slot, int64 [S, T]; meaningful only where the row is allowed."""
    steps, num_tokens = allowed_ST.shape
    index_T = torch.zeros(num_tokens + steps + 1, dtype=torch.long, device=slots_N.device)
    index_T[slots_N] = torch.arange(slots_N.numel(), device=slots_N.device)
    return torch.stack([index_T[1 + step : 1 + step + num_tokens] for step in range(steps)])


def loss_rows(allowed_ST: torch.Tensor, target: TargetOutput, vocab_map: VocabMap) -> torch.Tensor:
    """Rows that carry loss, bool [S, T]: allowed, and the target's argmax is in the draft vocabulary."""
    if not target.slots_N.numel():
        return allowed_ST
    hit_N = vocab_map.in_draft_V[target.argmax_N.long()]
    return allowed_ST & hit_N[row_slots(target.slots_N, allowed_ST)]


def unroll(draft: Eagle3Draft, micro: MicroBatch, steps: int) -> list[torch.Tensor]:
    """Pre-norm outputs [T, D] of every step."""
    batch, embed_TD = micro.batch, micro.embed_TD
    position_T, row_T = batch.position_T, torch.arange(batch.num_tokens, device=embed_TD.device)
    keys = [LayerKeys(row_T, batch.cu_seqlens) for _ in draft.decoder_layers]
    embed_TD = torch.nn.functional.pad(draft.embed(embed_TD), (0, 0, 0, steps))
    state_TD, outputs = draft.fuse(micro.target.aux_TA), []
    for step in range(steps):
        shifted_TD = embed_TD[1 + step : 1 + step + batch.num_tokens]
        outputs.append(draft.step(shifted_TD, state_TD, position_T + step, keys))
        state_TD = draft.next_state(outputs[-1])
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

    def __call__(self, draft: Eagle3Draft, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        """Loss and counts of each TTT step."""
        target, allowed_ST = micro.target, allowed_rows(micro.batch, self.ttt)
        carries_loss_ST = loss_rows(allowed_ST, target, self.teacher.vocab_map)
        slot_ST = row_slots(target.slots_N, allowed_ST)
        steps = []
        for step, output_TD in enumerate(unroll(draft, micro, self.ttt.steps)):
            row_Q = allowed_ST[step].nonzero().flatten()
            slot_Q = slot_ST[step, row_Q]
            target_logits_QU = self.teacher.logits(target.last_hidden_ND[slot_Q])
            rows = vocab_loss(draft.logits(output_TD[row_Q]), target_logits_QU, target.lse_N[slot_Q])
            carries_loss_Q = carries_loss_ST[step, row_Q]
            draft_ids_Q = self.teacher.vocab_map.target_ids_U[rows.argmax_Q]
            steps.append(
                DraftOutput(
                    loss_S=self._step_loss(rows, carries_loss_Q, norms, step),
                    num_loss_rows_S=carries_loss_Q.sum(),
                    num_allowed_rows_S=allowed_ST[step].sum(),
                    num_correct_S=(draft_ids_Q == target.argmax_N[slot_Q].long()).sum(),
                    accepted_S=rows.acceptance_Q.detach().sum(),
                    accepted_loss_rows_S=rows.acceptance_Q.detach()[carries_loss_Q].sum(),
                )
            )
        return DraftOutput(*(torch.stack(column) for column in zip(*(vars(entry).values() for entry in steps), strict=True)))

    def _step_loss(self, rows: RowLosses, carries_loss_Q: torch.Tensor, norms: LossNorms, step: int) -> torch.Tensor:
        """alpha = mean of sum_v min(p_full, q); `lk_lambda` mixes KL and 1 - alpha by exp(-decay * alpha), detached."""
        kl = rows.cross_entropy_Q[carries_loss_Q].sum() / norms.slots
        if self.loss.kind == "kl":
            return kl
        acceptance_Q, num_rows = rows.acceptance_Q[carries_loss_Q], norms.loss_rows_S[step].clamp_min(1)
        if self.loss.kind == "lk_alpha":
            return -acceptance_Q.clamp_min(torch.finfo(torch.float32).tiny).log().sum() / num_rows
        mean_acceptance = acceptance_Q.detach().sum() / num_rows if norms.acceptance_S is None else norms.acceptance_S[step]
        weight = self.loss.lk_kl_scale * torch.exp(-self.loss.lk_kl_decay * mean_acceptance)
        return weight * kl + (1 - weight) * (1 - acceptance_Q).sum() / num_rows
