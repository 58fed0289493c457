"""Each hot operation in plain PyTorch: the executable specification, and the path taken on CPU.

Shapes: Q query rows, T packed tokens, H query heads, G key/value heads, E head dim, A extra keys. Those of the loss are in
interface.py.
"""

import itertools

import torch

from engine.kernels.interface import LossRows, RowWeights, SlotTargets, VocabLoss

TINY = torch.finfo(torch.float32).tiny


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
    rows, lengths = bounds_Q.diff().tolist(), cu_seqlens.diff().tolist()
    documents = zip(
        query_QHE.float().split(rows),
        (query_index_Q - cu_seqlens[:-1].long().repeat_interleave(bounds_Q.diff())).split(rows),
        key_TGE.float().split(lengths),
        value_TGE.float().split(lengths),
        zip(*(key.float().split(rows) for key in extra_keys), strict=True) if extra_keys else itertools.repeat(()),
        zip(*(value.float().split(rows) for value in extra_values), strict=True) if extra_values else itertools.repeat(()),
        strict=False,
    )
    return torch.cat([_attend(*document) for document in documents]).to(query_QHE.dtype)


def _attend(query_QHE, index_Q, key_TGE, value_TGE, extra_keys, extra_values):  # one document, fp32
    _, num_heads, head_dim = query_QHE.shape
    num_keys, num_groups, _ = key_TGE.shape
    heads_per_group = num_heads // num_groups
    query_QHE = query_QHE * head_dim**-0.5
    key_HTE, value_HTE = (x_TGE.transpose(0, 1).repeat_interleave(heads_per_group, 0) for x_TGE in (key_TGE, value_TGE))
    future_QT = torch.arange(num_keys, device=index_Q.device) > index_Q[:, None]
    mask_QT = torch.zeros_like(future_QT, dtype=torch.float32).masked_fill(future_QT, float("-inf"))
    scores_HQT = torch.baddbmm(mask_QT.expand(num_heads, -1, -1), query_QHE.transpose(0, 1), key_HTE.mT)
    if not extra_keys:
        return torch.bmm(scores_HQT.softmax(-1), value_HTE).transpose(0, 1)
    key_AQHE, value_AQHE = (torch.stack(x).repeat_interleave(heads_per_group, 2) for x in (extra_keys, extra_values))
    scores_HQA = (query_QHE * key_AQHE).sum(-1).permute(2, 1, 0)
    weights_HQT, weights_HQA = torch.cat((scores_HQT, scores_HQA), -1).softmax(-1).split((num_keys, len(extra_keys)), -1)
    extra_QHE = (weights_HQA.permute(2, 1, 0)[..., None] * value_AQHE).sum(0)
    return torch.bmm(weights_HQT, value_HTE).transpose(0, 1) + extra_QHE


def vocab_loss(
    hidden_RD: torch.Tensor, weight_UD: torch.Tensor, rows: LossRows, targets: SlotTargets, weights: RowWeights
) -> VocabLoss:
    """Compare the draft's distribution of every row with the target's of its slot.

    hidden_RD: [R, D], what the draft's head reads. weight_UD: [U, D], that head. Differentiable in both.
    Source: EAGLE-3 (arXiv:2503.01840), section 3; LK losses: sum_v min(p, q) is the rate at which drafted tokens are accepted.
    """
    step_R = torch.repeat_interleave(
        torch.arange(len(rows.bounds), device=hidden_RD.device),
        torch.tensor([bounds[-1] - bounds[0] for bounds in rows.bounds], device=hidden_RD.device),
    )
    draft_RU = torch.nn.functional.linear(hidden_RD, weight_UD).float()
    target_RU = targets.logits(targets.hidden_ND[rows.slot_R])
    mass_in_draft_R = (target_RU.logsumexp(-1) - targets.lse_N[rows.slot_R]).exp()
    p_RU, log_q_RU = target_RU.softmax(-1), draft_RU.log_softmax(-1)
    cross_entropy_R = -torch.linalg.vecdot(p_RU, log_q_RU)
    acceptance_R = torch.minimum(p_RU * mass_in_draft_R[:, None], log_q_RU.exp()).sum(-1)
    log_acceptance_R = -acceptance_R.clamp_min(TINY).log()
    correct_R = draft_RU.gather(1, targets.draft_id_N[rows.slot_R, None])[:, 0] >= draft_RU.amax(-1)

    def sums(values_R: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(rows.bounds), device=values_R.device).index_add(0, step_R, values_R.float())

    cross_entropy_S, log_acceptance_S, acceptance_S = map(sums, (cross_entropy_R, log_acceptance_R, acceptance_R))
    result = VocabLoss(torch.zeros(()), cross_entropy_S, log_acceptance_S, acceptance_S, sums(correct_R))
    total = result.per_step(weights, sums(torch.ones_like(acceptance_R))).sum()
    return VocabLoss(total, *(sum_S.detach() for sum_S in result.sums))
