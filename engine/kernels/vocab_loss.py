"""The vocabulary loss, deferred: slots in chunks, gradients formed as the loss is, nothing of size [rows, U] left behind.

All rows of a slot learn the same distribution, so a chunk takes one product with the target's head for its slots and one with
the draft's for their rows. Loss and gradient need the same softmax, so both are taken from it at once; the backward pass only
scales.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.kernels.interface import LossRows, RowWeights, SlotTargets, VocabLoss
from engine.kernels.matmul import product
from engine.kernels.reference import TINY
from engine.kernels.rows import ROW_GRANULE


def vocab_loss(hidden_RD: Tensor, weight_UD: Tensor, rows: LossRows, targets: SlotTargets, weights: RowWeights) -> VocabLoss:
    """As `reference.vocab_loss`. Beyond the gradients of its two arguments, its memory does not grow with R."""
    return VocabLoss(*_DeferredLoss.apply(hidden_RD, weight_UD, rows, targets, weights, torch.is_grad_enabled()))


class _DeferredLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD, weight_UD, rows: LossRows, targets: SlotTargets, weights: RowWeights, with_gradients: bool
    ) -> tuple[Tensor, ...]:
        largest = torch.stack([part_S.max() for part_S in vars(weights).values() if part_S is not None]).max().clamp_min(TINY)
        walk = _Walk(hidden_RD, weight_UD, rows, targets, weights.scaled(1 / largest), with_gradients)
        for chunk in range(len(rows.bounds[0]) - 1):
            walk.take(chunk)
        # weights of at most 1 keep fp16 gradients in range until the loss scale arrives in backward
        ctx.gradients, ctx.largest = (walk.hidden_grad_RD, walk.weight_grad_DU.mT), largest
        result = VocabLoss(walk.sums.new_zeros(()), *walk.sums.unbind())
        ctx.mark_non_differentiable(*result.sums)
        num_rows_S = walk.sums.new_tensor([bounds[-1] - bounds[0] for bounds in rows.bounds])
        return result.per_step(weights, num_rows_S).sum(), *result.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_RD, weight_grad_UD = ctx.gradients
        ctx.gradients = None
        scale = grad_total * ctx.largest
        return hidden_grad_RD.mul_(scale), weight_grad_UD.mul_(scale).to(hidden_grad_RD.dtype), None, None, None, None


class _Walk:
    """One walk over the chunks of slots, and what it gathers: sums over rows, and both gradients if they are asked for."""

    def __init__(self, hidden_RD, weight_UD, rows: LossRows, targets: SlotTargets, weights: RowWeights, with_gradients: bool):
        self.hidden_RD, self.weight_UD, self.rows, self.targets, self.weights = hidden_RD, weight_UD, rows, targets, weights
        self.with_gradients = with_gradients
        self.sums = torch.zeros(4, len(rows.bounds), device=hidden_RD.device)
        shapes = (hidden_RD.shape, weight_UD.shape[::-1]) if with_gradients else ((0, 0), (0, 0))
        self.hidden_grad_RD = hidden_RD.new_empty(shapes[0])
        self.weight_grad_DU = weight_UD.new_zeros(shapes[1], dtype=torch.float32)

    def take(self, chunk: int) -> None:
        """Add the rows whose slots lie in this chunk."""
        spans = [slice(bounds[chunk], bounds[chunk + 1]) for bounds in self.rows.bounds]
        sizes = [span.stop - span.start for span in spans]
        if not any(sizes):
            return
        first = chunk * self.rows.slots_per_chunk
        slots = slice(first, first + self.rows.slots_per_chunk)
        p_nU, p_full_nU = self._target_probabilities(slots)
        draft_id_n = self.targets.draft_id_N[slots]
        silent = -sum(sizes) % ROW_GRANULE
        hidden_rD = torch.nn.functional.pad(torch.cat([self.hidden_RD[span] for span in spans]), (0, 0, 0, silent))
        log_q_rU = product(hidden_rD, self.weight_UD.mT).float().log_softmax(-1)
        *per_step, silent_rU = log_q_rU.split([*sizes, silent])
        silent_rU.zero_()
        for step, (span, log_q_kU) in enumerate(zip(spans, per_step, strict=True)):
            if sizes[step] == p_nU.shape[0]:
                self._take_step(step, log_q_kU, p_nU, p_full_nU, draft_id_n)
            elif sizes[step]:
                slot_k = self.rows.slot_R[span] - first
                self._take_step(step, log_q_kU, p_nU[slot_k], p_full_nU[slot_k], draft_id_n[slot_k])
        if self.with_gradients:
            self._accumulate(spans, sizes, hidden_rD, log_q_rU)

    def _take_step(self, step: int, log_q_kU: Tensor, p_kU: Tensor, p_full_kU: Tensor, draft_id_k: Tensor) -> None:
        """Add rows of one step, row by row beside their targets; `log_q_kU` becomes the gradient of their logits."""
        correct_k = log_q_kU.gather(1, draft_id_k[:, None])[:, 0] >= log_q_kU.amax(-1)
        cross_entropy_k = -torch.linalg.vecdot(p_kU, log_q_kU)
        q_kU = log_q_kU.exp_()
        acceptance_k = torch.minimum(q_kU, p_full_kU).sum(-1)
        log_acceptance_k = -acceptance_k.clamp_min(TINY).log()
        self.sums[:, step] += torch.stack((cross_entropy_k, log_acceptance_k, acceptance_k, correct_k.float())).sum(1)
        if not self.with_gradients:
            return
        weights = self.weights
        if weights.is_cross_entropy:
            q_kU.sub_(p_kU)  # its weight is applied in `_accumulate`, where there are D columns and not U
            return
        pull_k = torch.zeros_like(acceptance_k)  # of the loss towards more acceptance
        if weights.log_acceptance_S is not None:
            pull_k += torch.where(acceptance_k > TINY, weights.log_acceptance_S[step] / acceptance_k, 0)
        if weights.rejection_S is not None:
            pull_k += weights.rejection_S[step]
        below_kU = q_kU * (q_kU < p_full_kU)
        towards_kU = below_kU - q_kU * below_kU.sum(-1, keepdim=True)
        q_kU.sub_(p_kU).mul_(weights.cross_entropy_S[step]).sub_(towards_kU.mul_(pull_k[:, None]))

    def _accumulate(self, spans: list[slice], sizes: list[int], hidden_rD: Tensor, logits_grad_rU: Tensor) -> None:
        logits_grad_rU = logits_grad_rU.to(self.weight_UD.dtype)
        hidden_grad_rD = product(logits_grad_rU, self.weight_UD)
        if self.weights.is_cross_entropy:
            for step, rows in enumerate(_slices(sizes)):
                weight = self.weights.cross_entropy_S[step]
                hidden_grad_rD[rows] *= weight
                hidden_rD[rows] *= weight
        for span, rows in zip(spans, _slices(sizes), strict=True):
            self.hidden_grad_RD[span] = hidden_grad_rD[rows]
        self.weight_grad_DU += product(hidden_rD.mT, logits_grad_rU)

    def _target_probabilities(self, slots: slice) -> tuple[Tensor, Tensor]:
        """Over the draft vocabulary, fp32 [n, U]: renormalised, and as they are under the full vocabulary."""
        logits_nU = self.targets.logits(self.targets.hidden_ND[slots])
        mass_n = (logits_nU.logsumexp(-1) - self.targets.lse_N[slots]).exp()
        p_nU = logits_nU.softmax(-1)
        return p_nU, p_nU * mass_n[:, None]


def _slices(sizes: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
