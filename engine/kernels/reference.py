"""Each hot operation in plain PyTorch: the executable specification, and the path taken on CPU.

Shapes: Q query rows, T packed tokens, H query heads, G key/value heads, E head dim, A extra keys, U draft vocabulary.
"""

import itertools
from dataclasses import dataclass

import torch


def ancestor_attention(
    query_QHE: torch.Tensor,
    query_index_Q: torch.Tensor,
    key_TGE: torch.Tensor,
    value_TGE: torch.Tensor,
    extra_keys: list[torch.Tensor],
    extra_values: list[torch.Tensor],
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Attention of every row to a causal prefix of its own document and to its own ancestors, in one softmax.

    Row `r` sees keys `s <= query_index_Q[r]` of the document that holds `query_index_Q[r]`, and `extra_keys[a][r]` for all `a`.
    query_index_Q: int64 [Q], ascending. key_TGE, value_TGE: [T, G, E] with H a multiple of G.
    extra_keys, extra_values: A tensors [Q, G, E]. cu_seqlens: int [num_documents + 1]. Returns [Q, H, E]; scale E**-0.5.
    Source: EAGLE-3 (arXiv:2503.01840), section 3, training-time test.
    """
    bounds_Q = torch.searchsorted(query_index_Q, cu_seqlens.long())
    rows = bounds_Q.diff().tolist()
    documents = zip(
        query_QHE.split(rows),
        (query_index_Q - cu_seqlens[:-1].long().repeat_interleave(bounds_Q.diff())).split(rows),
        key_TGE.split(cu_seqlens.diff().tolist()),
        value_TGE.split(cu_seqlens.diff().tolist()),
        zip(*(key.split(rows) for key in extra_keys), strict=True) if extra_keys else itertools.repeat(()),
        zip(*(value.split(rows) for value in extra_values), strict=True) if extra_values else itertools.repeat(()),
        strict=False,
    )
    return torch.cat([_attend(*document) for document in documents])


def _attend(query_QHE, index_Q, key_TGE, value_TGE, extra_keys, extra_values):  # one document
    _, num_heads, head_dim = query_QHE.shape
    num_keys, num_groups, _ = key_TGE.shape
    heads_per_group = num_heads // num_groups
    query_QHE = query_QHE * head_dim**-0.5
    key_HTE, value_HTE = (x_TGE.transpose(0, 1).repeat_interleave(heads_per_group, 0) for x_TGE in (key_TGE, value_TGE))
    future_QT = torch.arange(num_keys, device=index_Q.device) > index_Q[:, None]
    mask_QT = torch.zeros_like(future_QT, dtype=query_QHE.dtype).masked_fill(future_QT, float("-inf"))
    scores_HQT = torch.baddbmm(mask_QT.expand(num_heads, -1, -1), query_QHE.transpose(0, 1), key_HTE.mT)
    if not extra_keys:
        weights_HQT = scores_HQT.softmax(-1, dtype=torch.float32).to(value_TGE.dtype)
        return torch.bmm(weights_HQT, value_HTE).transpose(0, 1)
    key_AQHE, value_AQHE = (torch.stack(x).repeat_interleave(heads_per_group, 2) for x in (extra_keys, extra_values))
    scores_HQA = (query_QHE * key_AQHE).sum(-1).permute(2, 1, 0)
    weights = torch.cat((scores_HQT, scores_HQA), -1).softmax(-1, dtype=torch.float32).to(value_TGE.dtype)
    weights_HQT, weights_HQA = weights.split((num_keys, len(extra_keys)), -1)
    extra_QHE = (weights_HQA.permute(2, 1, 0)[..., None] * value_AQHE).sum(0)
    return torch.bmm(weights_HQT, value_HTE).transpose(0, 1) + extra_QHE


@dataclass(frozen=True)
class RowLosses:
    """What a row's draft distribution is worth, one entry a row.

    cross_entropy_Q: fp32 [Q], -sum_v p[v] log q[v] in nats, p the target's softmax over the draft vocabulary.
    acceptance_Q: fp32 [Q], sum_v min(p_full[v], q[v]), p_full the target's probabilities under its full vocabulary.
    argmax_Q: int64 [Q], the draft's most likely draft id.
    """

    cross_entropy_Q: torch.Tensor
    acceptance_Q: torch.Tensor
    argmax_Q: torch.Tensor


def vocab_loss(draft_logits_QU: torch.Tensor, target_logits_QU: torch.Tensor, target_lse_Q: torch.Tensor) -> RowLosses:
    """Compare draft and target distributions over the draft vocabulary, row by row.

    draft_logits_QU: any float [Q, U]. target_logits_QU: fp32 [Q, U], the target's logits of the draft vocabulary.
    target_lse_Q: fp32 [Q], log-sum-exp of the target's logits over its full vocabulary.
    Differentiable in draft_logits_QU. Source: EAGLE-3 (arXiv:2503.01840), section 3.
    """
    draft_log_QU = draft_logits_QU.float().log_softmax(-1)
    target_QU = target_logits_QU.softmax(-1)
    mass_in_draft_Q = (target_logits_QU.logsumexp(-1) - target_lse_Q).exp()
    return RowLosses(
        cross_entropy_Q=-torch.linalg.vecdot(target_QU, draft_log_QU),
        acceptance_Q=torch.minimum(target_QU * mass_in_draft_Q[:, None], draft_log_QU.exp()).sum(-1),
        argmax_Q=draft_log_QU.argmax(-1),
    )
