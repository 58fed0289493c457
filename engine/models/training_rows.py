"""Rows that a draft learns from: which exist, which the mask allows, which carry loss.

Row `(t, i)` is prediction `i` at position `t`; it learns slot `u = t + 1 + i`. A slot is a position
with a target distribution that is learned.
"""

import torch

from engine.batch import PackedBatch, TargetOutput
from engine.config.sections import TttSection
from engine.models.vocab_map import VocabMap


def allowed_rows(batch: PackedBatch, ttt: TttSection) -> torch.Tensor:
    """Return which rows have a slot in their document and are allowed by the mask, bool [S, T].

    The mask alignment `inference` requires all of `t+1 .. u+1` to be assistant tokens, as when
    drafting starts from a token that the target has just produced. `specforge` requires this of
    `u-1` only.
    """
    mask_T = batch.assistant_mask_T
    num_tokens = batch.num_tokens
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
    """Return the positions that at least one allowed row learns, int64 [N], ascending.

    Both alignments allow row `(u - 1, 0)` if they allow any row of slot `u`, so step 0 has all
    slots.
    """
    return allowed_ST[0].nonzero().flatten() + 1


def row_slots(slots_N: torch.Tensor, allowed_ST: torch.Tensor) -> torch.Tensor:
    """Return the index into `slots_N` of each row's slot, int64 [S, T].

    The index is meaningful only for allowed rows.
    """
    steps, num_tokens = allowed_ST.shape
    index_T = torch.zeros(num_tokens + steps + 1, dtype=torch.long, device=slots_N.device)
    index_T[slots_N] = torch.arange(slots_N.numel(), device=slots_N.device)
    return torch.stack([index_T[1 + step : 1 + step + num_tokens] for step in range(steps)])


def loss_rows(allowed_ST: torch.Tensor, target: TargetOutput, vocab_map: VocabMap) -> torch.Tensor:
    """Return which rows carry loss, bool [S, T].

    These are the allowed rows for which the target's argmax is in the draft vocabulary.
    """
    if not target.slots_N.numel():
        return allowed_ST
    argmax_N, _ = target.head_stats
    hit_N = vocab_map.in_draft_V[argmax_N.long()]
    return allowed_ST & hit_N[row_slots(target.slots_N, allowed_ST)]
