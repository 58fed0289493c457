"""Chunked vocabulary loss, with gradients formed in the forward pass.

No [rows, U] tensor outlives a chunk. All rows of a slot learn the same distribution, so a chunk
takes one product with the target's head for its slots and one with the draft's head for their rows.
Loss and gradient need the same softmax and are computed from it together. The backward pass only
scales the gradients.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.kernels.interface import LossChunk, LossRows, RowScore, RowWeights, SlotTargets, VocabLoss
from engine.kernels.matmul import product
from engine.kernels.reference import TINY
from engine.kernels.row_index import ROW_GRANULE

SCORE_BYTES = 40  # per row of one TTT step and draft token: about ten fp32 tensors of a loss with a score


def row_loss(chunk: LossChunk, with_gradients: bool) -> Tensor:
    """Return statistics of a chunk's rows: cross-entropy, -log(acceptance), acceptance and correct.

    Returns fp32 [4, r], or [5, r] if the chunk has a score, which is then the last line. Statistics
    of padding rows are 0.
    with_gradients: overwrite the chunk's logits with the gradients of the weighted loss.
    """
    target_nU = chunk.target_nU.float()
    mass_n = (target_nU.logsumexp(-1) - chunk.lse_n).exp()
    p_nU = target_nU.softmax(-1)
    p_full_nU = p_nU * mass_n[:, None]
    num_stats = 4 if chunk.score is None else 5
    stats_xr = chunk.lse_n.new_zeros(num_stats, chunk.slot_r.numel())
    for rows in _slices(chunk.sizes):
        if rows.start == rows.stop:
            continue
        p_kU = p_nU
        p_full_kU = p_full_nU
        draft_id_k = chunk.draft_id_n
        if rows.stop - rows.start < p_nU.shape[0]:
            slot_k = chunk.slot_r[rows]
            p_kU = p_nU[slot_k]
            p_full_kU = p_full_nU[slot_k]
            draft_id_k = draft_id_k[slot_k]
        log_q_kU = chunk.logits_rU[rows].log_softmax(-1, dtype=torch.float32)
        weight_xk1 = chunk.weight_xr[:, rows, None]
        own_kU = None
        if chunk.score is not None:
            stats_xr[4, rows], own_kU = _own_score(log_q_kU, p_kU, chunk.score)
        stats_xr[:4, rows], gradient_kU = _fused_score(log_q_kU, p_kU, p_full_kU, draft_id_k, weight_xk1, chunk.mixes)
        if own_kU is not None:
            gradient_kU += own_kU * weight_xk1[3]
        if with_gradients:
            chunk.logits_rU[rows] = gradient_kU
    if with_gradients:
        chunk.logits_rU[sum(chunk.sizes) :] = 0
    return stats_xr


def _own_score(log_q_kU: Tensor, p_kU: Tensor, score: RowScore) -> tuple[Tensor, Tensor]:
    """Compute a custom score of rows of one step, [k], and its gradient by logits, [k, U]."""
    score_k, slope_kU = score(p_kU, log_q_kU)
    q_kU = log_q_kU.exp()
    towards_kU = q_kU * slope_kU
    return score_k, towards_kU - q_kU * towards_kU.sum(-1, keepdim=True)


def _fused_score(
    log_q_kU: Tensor, p_kU: Tensor, p_full_kU: Tensor, draft_id_k: Tensor, weight_xk1: Tensor, mixes: bool
) -> tuple[Tensor, Tensor]:
    """Compute the statistics of rows of one step, [4, k], and the gradient of their logits, [k, U].

    log_q_kU: the draft's log-probabilities; overwritten.
    p_kU, p_full_kU, draft_id_k: the target of each row.
    """
    correct_k = log_q_kU.gather(1, draft_id_k[:, None])[:, 0] >= log_q_kU.amax(-1)
    cross_entropy_k = -torch.linalg.vecdot(p_kU, log_q_kU)
    q_kU = log_q_kU.exp_()
    acceptance_k = torch.minimum(q_kU, p_full_kU).sum(-1)
    stats_4k = torch.stack((cross_entropy_k, -acceptance_k.clamp_min(TINY).log(), acceptance_k, correct_k.float()))
    if not mixes:
        return stats_4k, q_kU.sub_(p_kU).mul_(weight_xk1[0])
    below_kU = q_kU * (q_kU < p_full_kU)
    towards_kU = below_kU - q_kU * below_kU.sum(-1, keepdim=True)
    acceptance_k1 = acceptance_k[:, None]
    pull_k1 = torch.where(acceptance_k1 > TINY, weight_xk1[1] / acceptance_k1, 0) + weight_xk1[2]
    return stats_4k, q_kU.sub_(p_kU).mul_(weight_xk1[0]).sub_(towards_kU.mul_(pull_k1))


@dataclass(frozen=True)
class LossPass:
    """Options of how `vocab_loss` processes chunks.

    row_loss: scores the rows of a chunk.
    gradient_dtype: precision in which the head's gradient is accumulated over the chunks.
    in_place: whether `row_loss` allocates no additional memory.
    has_score: whether the loss has a score of its own.
    """

    row_loss: Callable[[LossChunk, bool], Tensor] = row_loss
    gradient_dtype: torch.dtype = torch.float32
    in_place: bool = False
    has_score: bool = False

    def bytes_per_slot(self, steps: int, vocab_size: int, dtype: torch.dtype) -> int:
        """Return the memory of one slot of a chunk, in bytes.

        It consists of the slot's target logits, and the draft's logits and gradients of its row of
        each TTT step.
        """
        if self.in_place:
            return vocab_size * ((steps + 1) * dtype.itemsize + 4)
        score_bytes = SCORE_BYTES if self.has_score else 0
        return vocab_size * ((2 * steps + 2) * 4 + score_bytes)

    def for_score(self, score: RowScore | None) -> "LossPass":
        """Return the options for a loss. A loss with a score is evaluated in plain PyTorch."""
        return self if score is None else replace(self, row_loss=row_loss, in_place=False, has_score=True)


def vocab_loss(
    hidden_RD: Tensor,
    weight_UD: Tensor,
    rows: LossRows,
    targets: SlotTargets,
    weights: RowWeights,
    loss_pass: LossPass = LossPass(),
) -> VocabLoss:
    """Chunked implementation of `reference.vocab_loss`.

    Memory: the gradients of both inputs, a second copy of the head's gradient, 16 bytes per row,
    and one chunk.
    """
    inputs = _Inputs(hidden_RD, weight_UD, rows, targets, weights)
    return VocabLoss(*_DeferredLoss.apply(hidden_RD, weight_UD, inputs, loss_pass, torch.is_grad_enabled()))


@dataclass(frozen=True)
class _Inputs:
    hidden_RD: Tensor
    weight_UD: Tensor
    rows: LossRows
    targets: SlotTargets
    weights: RowWeights


class _DeferredLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD, weight_UD, inputs: _Inputs, loss_pass: LossPass, with_gradients: bool
    ) -> tuple[Tensor, ...]:
        weights = inputs.weights
        bounds = inputs.rows.bounds
        largest = weights.stacked().max().clamp_min(TINY)
        # Scaling the weights to at most 1 (1024 for fp16) keeps fp16 gradients in range until the
        # backward pass provides the loss scale.
        largest = largest / (1024 if hidden_RD.dtype == torch.float16 else 1)
        stats_xR, *gradients = _run_chunks(inputs, weights.scaled(1 / largest), loss_pass, with_gradients)
        ctx.gradients = gradients
        ctx.largest = largest
        sums_xS = torch.stack([stats_xR[:, step[0] : step[-1]].sum(1) for step in bounds], 1)
        result = VocabLoss(sums_xS.new_zeros(()), *sums_xS.unbind())
        ctx.mark_non_differentiable(*result.sums)
        num_rows_S = torch.stack([sums_xS.new_full((), step[-1] - step[0]) for step in bounds])
        return result.per_step(weights, num_rows_S).sum(), *result.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_RD, weight_grad_DU = ctx.gradients
        ctx.gradients = None
        scale = grad_total * ctx.largest
        return hidden_grad_RD.mul_(scale), weight_grad_DU.mul_(scale).to(hidden_grad_RD.dtype).mT, None, None, None


def _run_chunks(
    inputs: _Inputs, weights: RowWeights, loss_pass: LossPass, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the statistics of all rows, [4, R] or [5, R] with a score, and both gradients.

    Gradients are empty without `with_gradients`.
    """
    hidden_RD = inputs.hidden_RD
    weight_UD = inputs.weight_UD
    loss_pass = loss_pass.for_score(weights.score)
    num_stats = 4 if weights.score is None else 5
    stats_xR = hidden_RD.new_empty(num_stats, hidden_RD.shape[0], dtype=torch.float32)
    hidden_grad_RD = torch.empty_like(hidden_RD) if with_gradients else hidden_RD.new_empty(0)
    shape = weight_UD.shape[::-1] if with_gradients else (0,)
    weight_grad_DU = weight_UD.new_zeros(shape, dtype=loss_pass.gradient_dtype)
    for spans, hidden_rD, chunk in _chunks(inputs, weights):
        stats_xr = loss_pass.row_loss(chunk, with_gradients)
        for span, rows in zip(spans, _slices(chunk.sizes), strict=True):
            stats_xR[:, span] = stats_xr[:, rows]
        if with_gradients:
            hidden_grad_rD = product(chunk.logits_rU, weight_UD)
            for span, rows in zip(spans, _slices(chunk.sizes), strict=True):
                hidden_grad_RD[span] = hidden_grad_rD[rows]
            weight_grad_DU += product(hidden_rD.mT, chunk.logits_rU)
    return stats_xR, hidden_grad_RD, weight_grad_DU


def _chunks(inputs: _Inputs, weights: RowWeights) -> Iterator[tuple[list[slice], Tensor, LossChunk]]:
    """Yield the slices of rows of each step, their hidden states and the chunk, if it has rows."""
    rows = inputs.rows
    targets = inputs.targets
    weight_xS = weights.stacked()
    for chunk in range(len(rows.bounds[0]) - 1):
        spans = [slice(step[chunk], step[chunk + 1]) for step in rows.bounds]
        sizes = [span.stop - span.start for span in spans]
        if not any(sizes):
            continue
        first = chunk * rows.slots_per_chunk
        silent = -sum(sizes) % ROW_GRANULE[targets.lse_N.device.type]
        slots = slice(first, first + rows.slots_per_chunk)
        slot_r = torch.cat([rows.slot_R[span] for span in spans]) - first
        weight_xr = torch.cat(
            [weight_x1.expand(-1, size) for weight_x1, size in zip(weight_xS.split(1, 1), sizes, strict=True)], 1
        )
        pad = torch.nn.functional.pad
        hidden_rD = pad(torch.cat([inputs.hidden_RD[span] for span in spans]), (0, 0, 0, silent))
        yield (
            spans,
            hidden_rD,
            LossChunk(
                logits_rU=product(hidden_rD, inputs.weight_UD.mT),
                target_nU=targets.logits(targets.hidden_ND[slots]),
                slot_r=pad(slot_r, (0, silent), value=-1),
                lse_n=targets.lse_N[slots],
                draft_id_n=targets.draft_id_N[slots],
                weight_xr=pad(weight_xr, (0, silent)),
                sizes=sizes,
                mixes=not weights.is_cross_entropy,
                score=weights.score,
            ),
        )


def _slices(sizes: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
