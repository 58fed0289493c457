"""Causal attention within segments of a packed row, optionally windowed.

It has only a forward pass, for frozen targets.

Shapes: T packed tokens, L tokens of a segment, Q queries, K keys, H query heads, G key/value heads,
E head dim of queries and keys, F head dim of values.

The attention sink of head h is an extra score z_h in the softmax that has no value. Let o be the
output and lse the log-sum-exp without the sink. The output with the sink is

    o' = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(z_h)) = o exp(lse) / (exp(lse) + exp(z_h)) = o sigmoid(lse - z_h)

Flash attention does not support sinks, so its output is scaled afterwards. It also requires one
head dim for queries, keys and values, a multiple of its granule. They are padded with zeros: zeros
in queries and keys do not change the scores, and the padding of the values is cut from the output.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import to_device
from engine.kernels.flash import HEAD_DIM_GRANULE, MAX_HEAD_DIM, FlashAttention, FlashInputs

ROWS_PER_BLOCK = 128
MAX_SCORES = 1 << 26


@dataclass(frozen=True)
class Segments:
    """Consecutive segments of a packed row. A token sees itself and earlier tokens of its segment.

    lengths: tokens of each segment.
    window: maximum number of tokens that a token sees, including itself; None = all.
    """

    lengths: tuple[int, ...]
    device: torch.device
    window: int | None = None

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Starts of the segments, with the total length at the end, int32."""
        return to_device(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32), self.device)


@dataclass(frozen=True)
class Scores:
    """How scores are formed from q . k, before and in the softmax.

    scale: factor. softcap: cap by tanh; None = no cap. sinks_H: sink of each head; None = no sinks.
    """

    scale: float
    softcap: float | None = None
    sinks_H: Tensor | None = None

    @classmethod
    def of(cls, query: Tensor, scaling: float | None, softcap: float | None, sinks_H: Tensor | None) -> "Scores":
        """Return the scores of queries [..., E]. scaling: None = E**-0.5."""
        return cls(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sinks_H)


@dataclass(frozen=True)
class PackedAttention:
    """Attention over packed segments, by flash attention or in blocks of plain PyTorch.

    flash: attends to all segments in one call if it supports the inputs; None = always use blocks.
    reason: what was chosen and why, as a phrase.
    """

    flash: FlashAttention | None
    reason: str

    def __call__(self, query_HTE: Tensor, key_GTE: Tensor, value_GTF: Tensor, segments: Segments, scores: Scores) -> Tensor:
        """Compute the attention output, [T, H, F]."""
        flash = self.flash
        fits = max(query_HTE.shape[2], value_GTF.shape[2]) <= MAX_HEAD_DIM
        if flash is None or not fits or (scores.softcap is not None and not flash.has_softcap):
            return in_blocks(query_HTE, key_GTE, value_GTF, segments, scores)
        return in_one_call(flash, (query_HTE, key_GTE, value_GTF), segments, scores)


def in_one_call(
    flash: FlashAttention, query_key_value: tuple[Tensor, Tensor, Tensor], segments: Segments, scores: Scores
) -> Tensor:
    """Compute attention over all segments in one call of flash attention, [T, H, F].

    query_key_value: query [H, T, E], key [G, T, E] and value [G, T, F].
    """
    width = -max(x.shape[2] for x in query_key_value) // HEAD_DIM_GRANULE * -HEAD_DIM_GRANULE
    query_THE, key_TGE, value_TGE = (_readable(x.transpose(0, 1), width) for x in query_key_value)
    inputs = FlashInputs(
        query_THE,
        key_TGE,
        value_TGE,
        cu_queries=segments.cu_seqlens,
        cu_keys=segments.cu_seqlens,
        scaling=scores.scale,
        window=segments.window,
        softcap=scores.softcap,
        longest=max(segments.lengths),
    )
    output_THE, lse_HT = flash.forward(inputs)
    output_THF = output_THE[..., : query_key_value[2].shape[2]]
    if scores.sinks_H is None:
        return output_THF
    share_TH = torch.sigmoid(lse_HT.t() - scores.sinks_H.float())
    return (output_THF.float() * share_TH[..., None]).to(output_THF.dtype)


def _readable(x: Tensor, width: int) -> Tensor:
    """Pad the last dimension to `width` with zeros, in a layout that flash attention can load.

    Rows must be contiguous and begin at multiples of the granule.
    """
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    aligned = all(step % HEAD_DIM_GRANULE == 0 for step in (*x.stride()[:-1], x.storage_offset()))
    return x if aligned and x.stride(-1) == 1 else x.contiguous()


def in_blocks(query_HTE: Tensor, key_GTE: Tensor, value_GTF: Tensor, segments: Segments, scores: Scores) -> Tensor:
    """Compute attention segment by segment, [T, H, F], without a full [L, L] matrix of scores.

    Segments with a window, soft cap or sinks are computed in blocks of rows.
    """
    queries, keys, values = (x.split(segments.lengths, dim=1) for x in (query_HTE, key_GTE, value_GTF))
    attended = []
    for query_HLE, key_GLE, value_GLF in zip(queries, keys, values, strict=True):
        attended.append(_in_blocks(query_HLE, key_GLE, value_GLF, segments.window, scores))
    return torch.cat(attended, dim=1).transpose(0, 1)


def _in_blocks(query_HLE: Tensor, key_GLE: Tensor, value_GLF: Tensor, window: int | None, scores: Scores) -> Tensor:
    length = query_HLE.shape[1]
    window = length if window is None else min(window, length)
    if window == length and scores.softcap is None and scores.sinks_H is None:
        return under_mask(query_HLE, key_GLE, value_GLF, None, scores)
    position_L = torch.arange(length, device=query_HLE.device)
    attended = []
    for first in range(0, length, ROWS_PER_BLOCK):
        rows = slice(first, min(first + ROWS_PER_BLOCK, length))
        keys = slice(max(0, first - window + 1), rows.stop)
        distance_QK = position_L[rows, None] - position_L[keys]
        allowed_QK = (distance_QK >= 0) & (distance_QK < window)
        attended.append(under_mask(query_HLE[:, rows], key_GLE[:, keys], value_GLF[:, keys], allowed_QK, scores))
    return torch.cat(attended, dim=1)


def under_mask(query_HQE: Tensor, key_GKE: Tensor, value_GKF: Tensor, mask_QK: Tensor | None, scores: Scores) -> Tensor:
    """Compute attention under an explicit mask, [H, Q, F].

    mask_QK: bool, whether a query may read a key, or a number added to each score; [Q, K] for all
    heads or [H, Q, K]. None = causal, with as many queries as keys.
    """
    (heads, queries, width), (groups, keys, value_width) = query_HQE.shape, value_GKF.shape
    is_plain = scores.softcap is None and scores.sinks_H is None
    shares_keys = is_plain and query_HQE.device.type == "cpu"  # on a GPU, only flash attention can, which takes no mask
    repeats = 1 if shares_keys else heads // groups
    key_HKE = key_GKE.repeat_interleave(repeats, dim=0) if repeats > 1 else key_GKE
    value_HKF = value_GKF.repeat_interleave(repeats, dim=0) if repeats > 1 else value_GKF
    if is_plain:
        # PyTorch can avoid storing all scores if queries, keys and values have the same head dim.
        padded = F.pad(value_HKF, (0, max(0, width - value_width)))
        attended = F.scaled_dot_product_attention(
            query_HQE[None],
            key_HKE[None],
            padded[None],
            attn_mask=mask_QK,
            is_causal=mask_QK is None,
            scale=scores.scale,
            enable_gqa=shares_keys and heads > groups,
        )
        return attended[0, ..., :value_width]
    if mask_QK is None:
        mask_QK = torch.ones(queries, keys, dtype=torch.bool, device=query_HQE.device).tril()
    rows = max(1, MAX_SCORES // (heads * keys))
    chunks = zip(query_HQE.split(rows, dim=1), mask_QK.split(rows, dim=-2), strict=True)
    return torch.cat([_written_out(query, key_HKE, value_HKF, mask, scores) for query, mask in chunks], dim=1)


def _written_out(query_HQE: Tensor, key_HKE: Tensor, value_HKF: Tensor, mask_QK: Tensor, scores: Scores) -> Tensor:
    scores_HQK = (query_HQE @ key_HKE.transpose(1, 2)).float() * scores.scale
    if scores.softcap is not None:
        scores_HQK = scores.softcap * torch.tanh(scores_HQK / scores.softcap)
    is_bool = mask_QK.dtype == torch.bool
    scores_HQK = scores_HQK.masked_fill(~mask_QK, -torch.inf) if is_bool else scores_HQK + mask_QK
    if scores.sinks_H is not None:
        sinks_HQ1 = scores.sinks_H.float().view(-1, 1, 1).expand(-1, query_HQE.shape[1], 1)
        scores_HQK = torch.cat([scores_HQK, sinks_HQ1], dim=-1)
    weights_HQK = scores_HQK.softmax(dim=-1)[..., : key_HKE.shape[1]]
    return weights_HQK.to(value_HKF.dtype) @ value_HKF
