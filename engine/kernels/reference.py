"""Reference implementation of each kernel in plain PyTorch. It is the executable specification.

Shapes: Q query rows, T packed tokens, H query heads, G key/value heads, R = H / G query heads per
key/value head, E head dim. The shapes of the loss are explained in interface.py.
"""

from collections.abc import Callable, Sequence

import torch

from engine.kernels.interface import (
    AttentionRows,
    BlockRows,
    FrozenHead,
    LogitBias,
    LogitTransform,
    LossRows,
    RowWeights,
    SlotDistributions,
    SlotTargets,
    TokenLoss,
    TokenRows,
    TokenTerms,
    VocabLoss,
)

TINY = torch.finfo(torch.float32).tiny
# The least magnitude that determines the scale of a group, and the largest number of e4m3.
FLOOR, LARGEST = 1e-10, torch.finfo(torch.float8_e4m3fn).max


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in fp32, or unchanged if it is in float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def ancestor_attention(
    query_QHE: torch.Tensor,
    key_TGE: torch.Tensor,
    value_TGE: torch.Tensor,
    extra_keys: list[torch.Tensor],
    extra_values: list[torch.Tensor],
    rows: AttentionRows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of every row to a causal prefix of its document and to its ancestors.

    Prefix and ancestors share one softmax; scores are scaled by E**-0.5.

    query_QHE: [Q, H, E]. key_TGE, value_TGE: [T, G, E], with H a multiple of G.
    extra_keys, extra_values: A tensors [any, G, E]; `rows` states which of their rows each row
        sees.
    Returns the output [Q, H, E] and its log-sum-exp, fp32 [Q, H], which is not differentiable.
    Source: EAGLE-3 (arXiv:2503.01840), section 3, training-time test.
    """
    num_keys, num_groups, head_dim = key_TGE.shape
    query_QGRE = upcast(query_QHE).unflatten(1, (num_groups, -1)) * head_dim**-0.5
    key_T = torch.arange(num_keys, device=key_TGE.device)
    position_Q1 = rows.position_Q[:, None]
    unseen_QT = (key_T < rows.start_Q[:, None]) | (key_T > position_Q1)
    scores = [torch.einsum("qgre,tge->qgrt", query_QGRE, upcast(key_TGE)).masked_fill(unseen_QT[:, None, None], -torch.inf)]
    for key_MGE, ancestor_Q in zip(extra_keys, rows.ancestors, strict=True):
        scores_QGR = torch.einsum("qgre,qge->qgr", query_QGRE, upcast(key_MGE[ancestor_Q]))
        scores.append(scores_QGR.masked_fill((ancestor_Q < 0)[:, None, None], -torch.inf)[..., None])
    scores_QGRK = torch.cat(scores, -1)
    lse_QGR = scores_QGRK.logsumexp(-1)
    weights_QGRT, *weights = (scores_QGRK - lse_QGR[..., None]).exp().split([num_keys] + [1] * len(extra_keys), -1)
    output_QGRE = torch.einsum("qgrt,tge->qgre", weights_QGRT, upcast(value_TGE))
    for weight_QGR1, value_MGE, ancestor_Q in zip(weights, extra_values, rows.ancestors, strict=True):
        output_QGRE = output_QGRE + weight_QGR1 * upcast(value_MGE[ancestor_Q])[:, :, None]
    return output_QGRE.flatten(1, 2).to(query_QHE.dtype), lse_QGR.flatten(1).detach()


def anchored_attention(
    query_QHE: torch.Tensor,
    key_TGE: torch.Tensor,
    value_TGE: torch.Tensor,
    own_key_PGE: torch.Tensor,
    own_value_PGE: torch.Tensor,
    rows: BlockRows,
) -> torch.Tensor:
    """Compute attention of rows of draft blocks to a range of context tokens and a range of rows of their block.

    Both ranges share one softmax; scores are scaled by E**-0.5.

    query_QHE: [Q, H, E]. key_TGE, value_TGE: context, [T, G, E], with H a multiple of G.
    own_key_PGE, own_value_PGE: rows of all blocks, [P, G, E].
    Returns [Q, H, E].
    Source: DFlash (arXiv:2602.06036).
    """
    num_keys, num_groups, head_dim = key_TGE.shape
    query_QGRE = upcast(query_QHE).unflatten(1, (num_groups, -1)) * head_dim**-0.5
    key_T = torch.arange(num_keys, device=key_TGE.device)
    key_P = torch.arange(len(own_key_PGE), device=key_TGE.device)
    sees_QT = (key_T >= rows.context_begin_Q[:, None]) & (key_T < rows.context_end_Q[:, None])
    sees_QP = (key_P >= rows.own_begin_Q[:, None]) & (key_P < rows.own_end_Q[:, None])
    sees_QK = torch.cat((sees_QT, sees_QP), 1)
    key_KGE = upcast(torch.cat((key_TGE, own_key_PGE)))
    value_KGE = upcast(torch.cat((value_TGE, own_value_PGE)))
    scores_QGRK = torch.einsum("qgre,kge->qgrk", query_QGRE, key_KGE)
    weights_QGRK = scores_QGRK.masked_fill(~sees_QK[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("qgrk,kge->qgre", weights_QGRK, value_KGE).flatten(1, 2).to(query_QHE.dtype)


def vocab_loss(
    hidden_RD: torch.Tensor,
    weight_UD: torch.Tensor,
    rows: LossRows,
    targets: SlotTargets,
    weights: RowWeights,
    loss_pass: object = None,
) -> VocabLoss:
    """Compute the loss between the draft's distribution of every row and the target's of its slot.

    hidden_RD: [R, D], input of the draft's head. weight_UD: [U, D], the head. Differentiable in
        both.
    loss_pass: ignored; other implementations use it to process chunks.
    Source: EAGLE-3 (arXiv:2503.01840), section 3. LK losses: sum_v min(p, q) is the rate at which
    drafted tokens are accepted.
    """
    step_R = torch.repeat_interleave(
        torch.arange(len(rows.bounds), device=hidden_RD.device),
        torch.tensor([bounds[-1] - bounds[0] for bounds in rows.bounds], device=hidden_RD.device),
    )
    draft_RU = upcast(torch.nn.functional.linear(hidden_RD, weight_UD))
    target_RU = targets.logits(targets.hidden_ND[rows.slot_R])
    mass_in_draft_R = (target_RU.logsumexp(-1) - targets.lse_N[rows.slot_R]).exp()
    p_RU = target_RU.softmax(-1)
    log_q_RU = draft_RU.log_softmax(-1)
    cross_entropy_R = -torch.linalg.vecdot(p_RU, log_q_RU)
    acceptance_R = torch.minimum(p_RU * mass_in_draft_R[:, None], log_q_RU.exp()).sum(-1)
    log_acceptance_R = -acceptance_R.clamp_min(TINY).log()
    correct_R = draft_RU.gather(1, targets.draft_id_N[rows.slot_R, None])[:, 0] >= draft_RU.amax(-1)

    def sums(values_R: torch.Tensor) -> torch.Tensor:
        values_R = upcast(values_R)
        return values_R.new_zeros(len(rows.bounds)).index_add(0, step_R, values_R)

    score_S = None
    if weights.score is not None:
        score_R, _ = weights.score(p_RU, log_q_RU)
        score_S = sums(score_R)
    result = VocabLoss(
        torch.zeros(()), sums(cross_entropy_R), sums(log_acceptance_R), sums(acceptance_R), sums(correct_R), score_S
    )
    total = result.per_step(weights, sums(torch.ones_like(acceptance_R))).sum()
    return VocabLoss(total, *(sum_S.detach() for sum_S in result.sums))


def token_loss(
    hidden_RD: torch.Tensor,
    head: FrozenHead,
    rows: TokenRows,
    terms: TokenTerms,
    targets: SlotDistributions | None = None,
    bias: LogitBias | None = None,
    token_pass: object = None,
) -> TokenLoss:
    """Compute the loss of rows against tokens, and against the target's distributions, over the whole vocabulary.

    hidden_RD: [R, D], input of the head; differentiable, and so are the tensors of `bias`.
    targets: distributions of the slots over all V tokens; needed if `terms.need_target`.
    token_pass: ignored; other implementations use it to process chunks.
    """
    logits_RV = head.transform(upcast(torch.nn.functional.linear(hidden_RD.to(head.weight_VD.dtype), head.weight_VD)))
    best_RK = logits_RV.detach().topk(rows.top_k, dim=-1).indices if rows.top_k else None
    if bias is not None:
        logits_RV = logits_RV + upcast(torch.nn.functional.linear(bias.factor_Rr, bias.weight_Vr))
    log_q_RV = logits_RV.log_softmax(-1)
    label_R = likeliest_R = rows.label_R
    log_p_RV = None
    if targets is not None:
        assert rows.slot_R is not None, "rows with targets have slots"
        log_p_RV = targets.logits(targets.hidden_ND[rows.slot_R]).log_softmax(-1)
        likeliest_R = log_p_RV.argmax(-1)
        if label_R is None:
            label_R = likeliest_R
    assert label_R is not None and likeliest_R is not None, "rows without labels have targets"
    cross_entropy_R = -log_q_RV.gather(1, label_R[:, None])[:, 0]
    loss_R = terms.cross_entropy * cross_entropy_R
    kl_R = total_variation_R = None
    if log_p_RV is not None:
        p_RV = log_p_RV.exp()
        kl_R = (p_RV * (log_p_RV - log_q_RV)).sum(-1)
        total_variation_R = (p_RV - log_q_RV.exp()).abs().sum(-1) / 2
        loss_R = loss_R + terms.kl * kl_R + terms.total_variation * total_variation_R
        kl_R = kl_R.detach()
        total_variation_R = total_variation_R.detach()
    correct_R = log_q_RV.gather(1, likeliest_R[:, None])[:, 0] >= log_q_RV.amax(-1)
    weight_R = rows.weigh(cross_entropy_R.detach())
    total = (weight_R * loss_R).sum()
    return TokenLoss(total, weight_R, cross_entropy_R.detach(), upcast(correct_R), kl_R, total_variation_R, best_RK)


def head_stats(logits_NV: torch.Tensor, transform: LogitTransform) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest logit of each row, the first token that has it, and the row's log-sum-exp.

    logits_NV: raw outputs of the target's head, in any precision; `transform` is applied here.
    Returns fp32 [N], int64 [N] and fp32 [N].
    """
    logits_NV = transform(upcast(logits_NV))
    best_N, argmax_N = logits_NV.max(dim=-1)
    return best_N, argmax_N, logits_NV.logsumexp(dim=-1)


def dequantised(codes: torch.Tensor, scale: torch.Tensor, block: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Multiply every value by the scale of its block in fp32, and return the result in `dtype`.

    block: number of values that share a scale, along each dimension.
    """
    for dim, size in enumerate(block):
        if size > 1 and scale.shape[dim] > 1:
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, codes.shape[dim])
    return (codes.float() * scale.float()).to(dtype)


def fp8_linear(
    rows_MK: torch.Tensor,
    codes_XNK: torch.Tensor,
    scale_XGJ: torch.Tensor,
    block: tuple[int, int],
    ends_X: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply rows by the transposes of their experts' fp8 weights, [M, N].

    rows_MK: [M, K], sorted by expert. codes_XNK: fp8 weights, [X, N, K].
    scale_XGJ: fp32 [X, ceil(N / rows), ceil(K / columns)], one scale for each block.
    block: rows and columns of a block.
    ends_X: ascending, end of each expert's rows; None = all rows belong to the only expert.
        Results of rows after the last end are undefined.
    """

    def weight_NK(expert: int) -> torch.Tensor:
        return dequantised(codes_XNK[expert], scale_XGJ[expert], block, rows_MK.dtype)

    return grouped_linear(rows_MK, weight_NK, codes_XNK.shape[1], ends_X)


def grouped_linear(
    rows_MK: torch.Tensor, weight_NK: Callable[[int], torch.Tensor], num_outputs: int, ends_X: torch.Tensor | None
) -> torch.Tensor:
    """Multiply rows by the transposes of their experts' weights, [M, num_outputs].

    rows_MK: [M, K], sorted by expert.
    weight_NK: returns the weight of one expert; called one at a time, only for experts with rows.
    ends_X: as in `fp8_linear`. Rows after the last end give zeros.
    """
    ends = [len(rows_MK)] if ends_X is None else ends_X.tolist()
    out_MN = rows_MK.new_zeros(len(rows_MK), num_outputs)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start < end:
            out_MN[start:end] = torch.nn.functional.linear(rows_MK[start:end], weight_NK(expert))
    return out_MN


def quantised_rows(rows_MK: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows to e4m3 with one scale for every `group` inputs.

    The largest magnitude of a group, or FLOOR if that is larger, maps to the largest number of
    e4m3.
    Returns codes, e4m3 [M, K], and scales, fp32 [M, ceil(K / group)].
    Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2.
    """
    num_inputs = rows_MK.shape[1]
    rows_MJg = torch.nn.functional.pad(rows_MK.float(), (0, -num_inputs % group)).unflatten(1, (-1, group))
    # On a GPU, division by a Python number multiplies by its rounded inverse, which rounds
    # differently. So the divisor is a tensor.
    largest = torch.full((), LARGEST, device=rows_MK.device)
    scale_MJ = rows_MJg.abs().amax(-1).clamp_min(FLOOR) / largest
    return (rows_MJg / scale_MJ[..., None]).to(torch.float8_e4m3fn).flatten(1)[:, :num_inputs], scale_MJ


def rounded_rows(rows_MK: torch.Tensor, group: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Quantise rows with `quantised_rows` and dequantise them again.

    dtype: of the result; None = dtype of the rows.
    """
    return dequantised(*quantised_rows(rows_MK, group), (1, group), dtype or rows_MK.dtype)


def fp8_activations(
    rows_MK: torch.Tensor,
    codes_XNK: torch.Tensor,
    scale_XGJ: torch.Tensor,
    block: tuple[int, int],
    ends_X: torch.Tensor | None = None,
    *,
    group: int,
) -> torch.Tensor:
    """Multiply quantised rows by the transposes of their experts' fp8 weights, [M, N].

    Arguments are those of `fp8_linear`, plus `group`: inputs of a row that share a scale. The
    product is computed in fp32 and rounded once, to the dtype of the rows.
    """

    def weight_NK(expert: int) -> torch.Tensor:
        return dequantised(codes_XNK[expert], scale_XGJ[expert], block, torch.float32)

    out_MN = grouped_linear(rounded_rows(rows_MK, group, torch.float32), weight_NK, codes_XNK.shape[1], ends_X)
    return out_MN.to(rows_MK.dtype)


def permute_rows(
    rows_TD: torch.Tensor, source_N: torch.Tensor, out_ND: torch.Tensor, scale_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Write row `source_N[n]` of rows_TD to row n of out_ND, and return out_ND.

    scale_T: fp32, required if rows_TD holds e4m3 codes; a row's values are then its codes times its
    scale. out_ND may be a view with gaps between its rows.
    """
    if scale_T is None:
        return torch.index_select(rows_TD, 0, source_N, out=out_ND)
    values_ND = rows_TD.view(torch.uint8).index_select(0, source_N).view(rows_TD.dtype).float()
    return out_ND.copy_(values_ND * scale_T.index_select(0, source_N)[:, None])


def quantise_rows(rows_TD: torch.Tensor, source_N: torch.Tensor | None, codes_ND: torch.Tensor, scale_N: torch.Tensor) -> None:
    """Write row `source_N[n]` in e4m3 to row n of codes_ND, and its one scale to scale_N.

    source_N: None = every row, in order. Scales are those of `quantised_rows` with one group per
    row. The error of a dequantised value is at most a sixteenth of its magnitude, or 2**-10 of its
    row's scale if that is larger.
    """
    chosen_ND = rows_TD if source_N is None else rows_TD.index_select(0, source_N)
    codes, scale_N1 = quantised_rows(chosen_ND, rows_TD.shape[1])
    codes_ND.copy_(codes)
    scale_N.copy_(scale_N1[:, 0])


def unpermute_rows(
    rows_MD: torch.Tensor, place_TJ: torch.Tensor, out_TD: torch.Tensor, weight_TJ: torch.Tensor | None = None
) -> torch.Tensor:
    """Write the weighted sum of each token's rows to out_TD, and return out_TD.

    Sums are formed in fp32, in the order of J.

    place_TJ: indices of a token's rows in rows_MD; -1 = no row. Rows and weights at a place of -1
        are ignored, even if they are NaN.
    weight_TJ: factor of each row; None = 1.
    rows_MD may hold e4m3 codes.
    """
    total_TD = torch.zeros(out_TD.shape, dtype=torch.float32, device=out_TD.device)
    if len(rows_MD) == 0:
        return out_TD.zero_()
    for j, place_T in enumerate(place_TJ.unbind(1)):
        values_TD = rows_MD[place_T.clamp_min(0)].float()
        if weight_TJ is not None:
            values_TD = values_TD * weight_TJ[:, j, None].float()
        total_TD += values_TD.masked_fill_(place_T[:, None] < 0, 0)
    return out_TD.copy_(total_TD)
