"""Chunked loss of rows against tokens and target distributions, with gradients formed in the forward pass.

The head is frozen, so only the gradients of its inputs are needed. No [rows, V] tensor outlives a
chunk. With q the softmax of a row's logits z, p the target's distribution and s = sign(q - p):

    d/dz -log q[label] = q - onehot(label)      d/dz KL(p, q) = q - p      d/dz sum |p - q| / 2 = q (s - <q, s>) / 2

The gradients of one row are proportional to its weight. Weights that depend on the cross-entropy
can therefore be applied after the pass, unless a matrix of the bias is trained: its gradient sums
over rows, and a pass without gradients finds the weights first.

Shapes: R rows, r of a chunk, k of a piece of it, N slots, n of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.kernels.interface import (
    FrozenHead,
    LogitBias,
    LogitTransform,
    SlotDistributions,
    TokenChunk,
    TokenLoss,
    TokenRows,
    TokenTargets,
    TokenTerms,
)
from engine.kernels.matmul import add_product, adds_in_place, product
from engine.kernels.reference import upcast
from engine.kernels.row_index import ROW_GRANULE

NUM_STATS = 4  # per row: cross-entropy, correct, KL divergence, total variation
# Bytes of logits that plain PyTorch processes at a time. On a CPU they stay in its cache.
PIECE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
# Rows of a chunk from which a CPU's products become no faster.
ENOUGH_ROWS = {"cpu": 256, "cuda": 1 << 30}


def token_row_loss(chunk: TokenChunk, with_gradients: bool) -> Tensor:
    """Return statistics of a chunk's rows: cross-entropy, correct, KL divergence and total variation.

    Returns [4, r] in fp32, or in float64 if the logits are. The last two are 0 without targets.
    with_gradients: overwrite `logits_rV` with the gradients of the losses by the logits before the
        bias, times the derivative of the soft cap. With a soft cap, also overwrite `bias_rV`, with the
        gradients by the bias; without one, the gradients are the same.
    """
    logits_rV = chunk.logits_rV
    num_rows, vocab_size = logits_rV.shape
    precision = upcast(logits_rV[:0]).dtype
    stats_4r = torch.zeros(NUM_STATS, num_rows, dtype=precision, device=logits_rV.device)
    size = max(1, PIECE_BYTES[logits_rV.device.type] // (vocab_size * precision.itemsize))
    for first in range(0, num_rows, size):
        rows = slice(first, min(first + size, num_rows))
        _score(_piece(chunk, rows), with_gradients, stats_4r[:, rows])
    return stats_4r


def _piece(chunk: TokenChunk, rows: slice) -> TokenChunk:
    """Return some of the rows of a chunk, as views."""
    targets = chunk.targets
    return replace(
        chunk,
        logits_rV=chunk.logits_rV[rows],
        bias_rV=None if chunk.bias_rV is None else chunk.bias_rV[rows],
        label_r=chunk.label_r[rows],
        targets=None if targets is None else replace(targets, slot_r=targets.slot_r[rows]),
    )


def _score(piece: TokenChunk, with_gradients: bool, stats_4k: Tensor) -> None:
    """Fill in the statistics of rows, and overwrite their logits with gradients if asked for."""
    transform = piece.transform
    soft_cap = transform.soft_cap
    logits_kV = transform(upcast(piece.logits_rV))
    slope_kV = None
    if with_gradients and soft_cap is not None:
        slope_kV = 1 - (logits_kV * (transform.temperature / soft_cap)) ** 2
    if piece.bias_rV is not None:
        logits_kV += piece.bias_rV
    gradient_kV = _compare(logits_kV, piece, stats_4k)
    if not with_gradients:
        return
    terms = piece.terms
    if terms.cross_entropy:
        onehot_k1 = gradient_kV.new_full((len(gradient_kV), 1), -terms.cross_entropy)
        gradient_kV.scatter_add_(1, piece.label_r[:, None], onehot_k1)
    if slope_kV is not None:
        if piece.bias_rV is not None:
            piece.bias_rV.copy_(gradient_kV)
        gradient_kV *= slope_kV
    piece.logits_rV.copy_(gradient_kV)


def _compare(logits_kV: Tensor, piece: TokenChunk, stats_4k: Tensor) -> Tensor:
    """Fill in the statistics of rows, and return the gradient of their losses, [k, V], all but its term in the label.

    logits_kV: overwritten.
    """
    best_k = logits_kV.amax(-1)
    label_logit_k = logits_kV.gather(1, piece.label_r[:, None])[:, 0]
    terms = piece.terms
    targets = piece.targets
    if targets is None:
        q_kV = torch.softmax(logits_kV, -1, out=logits_kV)
        stats_4k[0] = best_k - q_kV.amax(-1).log() - label_logit_k
        stats_4k[1] = label_logit_k >= best_k
        return q_kV if terms.cross_entropy == 1 else q_kV.mul_(terms.cross_entropy)

    stats_4k[1] = logits_kV.gather(1, targets.token_n[targets.slot_r][:, None])[:, 0] >= best_k
    q_kV = torch.softmax(logits_kV, -1)
    lse_k = best_k - q_kV.amax(-1).log()
    stats_4k[0] = lse_k - label_logit_k
    target_kV = targets.logits_nV[targets.slot_r].to(logits_kV.dtype)
    p_kV = torch.softmax(target_kV, -1)
    target_lse_k = target_kV.amax(-1) - p_kV.amax(-1).log()
    difference_kV = torch.sub(q_kV, p_kV)
    stats_4k[2] = torch.linalg.vecdot(p_kV, target_kV.sub_(logits_kV)) + lse_k - target_lse_k
    # On a CPU, `vector_norm` adds the terms of a row one after the other, and is 4e-5 too small for 32,000.
    sign_kV = torch.sign(difference_kV, out=logits_kV)
    stats_4k[3] = torch.linalg.vecdot(difference_kV, sign_kV) / 2
    if terms.total_variation:
        mean_k1 = torch.linalg.vecdot(q_kV, sign_kV)[:, None]
        half = terms.total_variation / 2
        q_kV.mul_(sign_kV.mul_(half).sub_(mean_k1 * half - terms.cross_entropy))
    else:
        q_kV.mul_(terms.cross_entropy)
    return q_kV.add_(difference_kV, alpha=terms.kl) if terms.kl else q_kV


@dataclass(frozen=True)
class TokenPass:
    """Options of how `token_loss` processes chunks.

    row_loss: scores the rows of a chunk, as `token_row_loss` does.
    chunk_bytes: memory of the logits and of the target's logits of one chunk, in bytes.
    """

    row_loss: Callable[[TokenChunk, bool], Tensor] = token_row_loss
    chunk_bytes: int = 1 << 26

    def rows_per_chunk(self, inputs: "_Inputs") -> int:
        """Return the rows of a chunk: those that fit into `chunk_bytes`, but at most `ENOUGH_ROWS`."""
        head_VD = inputs.head.weight_VD
        row_bytes = head_VD.itemsize
        if inputs.bias is not None and not inputs.sums_bias:
            row_bytes += inputs.bias.weight_Vr.itemsize
        if inputs.targets is not None:
            row_bytes += torch.float32.itemsize
        within_budget = max(1, self.chunk_bytes // (len(head_VD) * row_bytes))
        return min(within_budget, ENOUGH_ROWS[head_VD.device.type])


def token_loss(
    hidden_RD: Tensor,
    head: FrozenHead,
    rows: TokenRows,
    terms: TokenTerms,
    targets: SlotDistributions | None = None,
    bias: LogitBias | None = None,
    token_pass: TokenPass = TokenPass(),
) -> TokenLoss:
    """Chunked implementation of `reference.token_loss`.

    Memory: the gradients of the inputs, 24 bytes per row, and one chunk.
    """
    detached = None
    factor_Rr = weight_Vr = None
    if bias is not None:
        factor_Rr = bias.factor_Rr
        weight_Vr = bias.weight_Vr
        detached = LogitBias(factor_Rr.detach(), weight_Vr.detach())
    best_RK = None
    if rows.top_k:
        best_RK = torch.empty(len(hidden_RD), rows.top_k, dtype=torch.int64, device=hidden_RD.device)
    inputs = _Inputs(hidden_RD.detach(), head, rows, terms, targets, detached, token_pass)
    total, weight_R, stats_xR = _TokenLoss.apply(hidden_RD, factor_Rr, weight_Vr, inputs, best_RK, torch.is_grad_enabled())
    cross_entropy_R, correct_R, kl_R, total_variation_R = stats_xR
    if targets is None:
        return TokenLoss(total, weight_R, cross_entropy_R, correct_R, best_RK=best_RK)
    return TokenLoss(total, weight_R, cross_entropy_R, correct_R, kl_R, total_variation_R, best_RK)


@dataclass(frozen=True)
class _Inputs:
    hidden_RD: Tensor
    head: FrozenHead
    rows: TokenRows
    terms: TokenTerms
    targets: SlotDistributions | None
    bias: LogitBias | None
    token_pass: TokenPass = field(default_factory=TokenPass)

    @property
    def num_rows(self) -> int:
        return len(self.hidden_RD)

    @property
    def sums_bias(self) -> bool:
        """Whether the bias is added to the products with the head, so that it needs no tensor of its own."""
        if self.bias is None or self.rows.top_k or self.head.transform != LogitTransform():
            return False
        weight_VD = self.head.weight_VD
        return adds_in_place(weight_VD) and self.bias.weight_Vr.dtype == weight_VD.dtype

    @property
    def precision(self) -> torch.dtype:
        """Precision of statistics: fp32, or float64 if the head is."""
        return upcast(self.head.weight_VD[:0]).dtype

    def chunks(self) -> Iterator[slice]:
        """Yield the rows of each chunk."""
        size = self.token_pass.rows_per_chunk(self)
        for first in range(0, self.num_rows, size):
            yield slice(first, min(first + size, self.num_rows))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        factor_Rr: Tensor | None,
        weight_Vr: Tensor | None,
        inputs: _Inputs,
        best_RK: Tensor | None,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss. best_RK: filled in with the most likely tokens of each row."""
        row_weight_R = None
        if with_gradients and ctx.needs_input_grad[2]:
            row_weight_R = _weights_before_the_pass(inputs)
        wanted = _Gradients.empty(inputs, row_weight_R) if with_gradients else None
        stats_xR = _run_chunks(inputs, wanted, best_RK)
        weight_R = inputs.rows.weigh(stats_xR[0])
        ctx.gradients = wanted
        ctx.weight_R = weight_R
        ctx.mark_non_differentiable(weight_R, stats_xR)
        cross_entropy_R, _, kl_R, total_variation_R = stats_xR
        terms = inputs.terms
        loss_R = terms.cross_entropy * cross_entropy_R + terms.kl * kl_R + terms.total_variation * total_variation_R
        return (weight_R * loss_R).sum(), weight_R, stats_xR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients: _Gradients = ctx.gradients
        ctx.gradients = None
        # The scale stays in fp32, so that gradients are rounded once more at most.
        scale_R1 = (grad_total * ctx.weight_R)[:, None]
        hidden_RD = gradients.hidden_RD.mul_(scale_R1)
        if gradients.factor_Rr is None:
            return hidden_RD, None, None, None, None, None
        factor_Rr = gradients.factor_Rr.mul_(scale_R1)
        weight_Vr = None
        if gradients.weight_Vr is not None:
            weight_Vr = gradients.weight_Vr.mul_(grad_total).to(factor_Rr.dtype)
        return hidden_RD, factor_Rr, weight_Vr, None, None, None


def _weights_before_the_pass(inputs: _Inputs) -> Tensor:
    """Return the weights of the rows, [R], from a pass without gradients if they depend on the cross-entropy."""
    rows = inputs.rows
    if rows.has_fixed_weights:
        return rows.weigh(torch.zeros(inputs.num_rows, dtype=inputs.precision, device=inputs.hidden_RD.device))
    if rows.label_R is not None:
        inputs = replace(inputs, targets=None)  # weights depend on the cross-entropy alone
    return rows.weigh(_run_chunks(inputs, None, None)[0])


@dataclass(frozen=True)
class _Gradients:
    """Gradients of the loss. hidden_RD, factor_Rr: of each row's loss without its weight; weight_Vr: of the weighted sum.

    row_weight_R: weights of the rows, for `weight_Vr`.
    """

    hidden_RD: Tensor
    factor_Rr: Tensor | None
    weight_Vr: Tensor | None
    row_weight_R: Tensor | None

    @classmethod
    def empty(cls, inputs: _Inputs, row_weight_R: Tensor | None) -> "_Gradients":
        hidden_RD = torch.empty_like(inputs.hidden_RD)
        bias = inputs.bias
        if bias is None:
            return cls(hidden_RD, None, None, None)
        weight_Vr = None
        if row_weight_R is not None:
            weight_Vr = torch.zeros_like(upcast(bias.weight_Vr))
        return cls(hidden_RD, torch.empty_like(bias.factor_Rr), weight_Vr, row_weight_R)

    def add(self, rows: slice, inputs: _Inputs, chunk: TokenChunk) -> None:
        """Add the gradients of a chunk whose logits were overwritten with gradients. rows: without padding."""
        num_rows = rows.stop - rows.start
        head = inputs.head
        hidden_rD = product(chunk.logits_rV, head.weight_VD)[:num_rows]
        self.hidden_RD[rows] = hidden_rD.mul_(head.transform.scale / head.transform.temperature)
        bias = inputs.bias
        if bias is None or self.factor_Rr is None:
            return
        gradient_rV = chunk.logits_rV
        if head.transform.soft_cap is not None and chunk.bias_rV is not None:
            gradient_rV = chunk.bias_rV
        gradient_rV = gradient_rV[:num_rows].to(bias.weight_Vr.dtype)
        self.factor_Rr[rows] = product(gradient_rV, bias.weight_Vr)
        if self.weight_Vr is not None and self.row_weight_R is not None:
            weighted_rr = upcast(bias.factor_Rr[rows]) * self.row_weight_R[rows, None]
            if gradient_rV.dtype == torch.float16:  # a row's weight may be below the least number of fp16
                gradient_rV = gradient_rV.float()
            add_product(self.weight_Vr, gradient_rV.mT, weighted_rr.to(gradient_rV.dtype))


def _run_chunks(inputs: _Inputs, gradients: _Gradients | None, best_RK: Tensor | None) -> Tensor:
    """Return statistics of all rows, [4, R]; fill in the gradients and the most likely tokens, if asked for."""
    stats_xR = torch.zeros(NUM_STATS, inputs.num_rows, dtype=inputs.precision, device=inputs.hidden_RD.device)
    for rows in inputs.chunks():
        stats_xR[:, rows] = _run_chunk(inputs, rows, gradients, best_RK)
    return stats_xR


def _run_chunk(inputs: _Inputs, rows: slice, gradients: _Gradients | None, best_RK: Tensor | None) -> Tensor:
    """Return statistics of some rows, [4, r]; fill in their gradients and most likely tokens, if asked for."""
    chunk = _chunk(inputs, rows)
    num_rows = rows.stop - rows.start
    if best_RK is not None:  # the transform of logits increases with them, as scales and temperatures are positive
        best_RK[rows] = chunk.logits_rV[:num_rows].topk(best_RK.shape[1], dim=-1).indices
    stats_4r = inputs.token_pass.row_loss(_piece(chunk, slice(num_rows)), gradients is not None)
    if gradients is not None:
        gradients.add(rows, inputs, chunk)
    return stats_4r


def _chunk(inputs: _Inputs, rows: slice) -> TokenChunk:
    """Compute the logits of a chunk. They have padding rows at the end, which mean nothing."""
    weight_VD = inputs.head.weight_VD
    logits_rV = product(_padded(inputs.hidden_RD[rows]).to(weight_VD.dtype), weight_VD.mT)
    bias_rV = None
    if inputs.bias is not None:
        factor_rr = _padded(inputs.bias.factor_Rr[rows])
        if inputs.sums_bias:
            add_product(logits_rV, factor_rr, inputs.bias.weight_Vr.mT)
        else:
            bias_rV = product(factor_rr, inputs.bias.weight_Vr.mT)
    targets = _targets(inputs, rows)
    label_R = inputs.rows.label_R
    if label_R is not None:
        label_r = label_R[rows]
    else:
        assert targets is not None, "rows without labels have targets"
        label_r = targets.token_n[targets.slot_r]
    return TokenChunk(
        logits_rV=logits_rV,
        bias_rV=bias_rV,
        transform=inputs.head.transform,
        label_r=label_r,
        targets=targets,
        terms=inputs.terms,
    )


def _padded(x_rD: Tensor) -> Tensor:
    """Return rows with zeros after them, so that products have few different sizes."""
    num_missing = -len(x_rD) % ROW_GRANULE[x_rD.device.type]
    return torch.nn.functional.pad(x_rD, (0, 0, 0, num_missing)) if num_missing else x_rD


def _targets(inputs: _Inputs, rows: slice) -> TokenTargets | None:
    targets = inputs.targets
    if targets is None:
        return None
    slot_R = inputs.rows.slot_R
    assert slot_R is not None, "rows with targets have slots"
    # Rows are ordered by block, so the slots of a chunk are close to each other.
    host_slot_r = inputs.rows.slots_on_host[rows]
    slots = slice(int(host_slot_r.min()), int(host_slot_r.max()) + 1)
    logits_nV = targets.logits(targets.hidden_ND[slots])
    return TokenTargets(logits_nV, slot_R[rows] - slots.start, logits_nV.argmax(-1))
