"""Expert parallelism: own tokens go to the ranks that hold their experts, once a rank, and come back as sums.

Router, shared experts and the experts' own forward stay the model's. No token is dropped, however unevenly they fall.
"""

import torch
from torch import Tensor, nn

from engine.parallel.collectives import exchange_counts, exchange_rows
from engine.parallel.mesh import Group

ABSENT = -1  # a choice of experts that another rank holds


def dispatch(experts: nn.Module, num_experts: int, group: Group) -> None:
    """Let an experts module, `(hidden [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]`, run over a group.

    It holds experts rank * n .. rank * n + n - 1, `n = num_experts / group.size`, under the local ids 0 .. n - 1.
    """
    num_local = num_experts // group.size
    inner = _beside_identity(experts.forward, num_local) if num_identities(experts) else experts.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args, **kwargs) -> Tensor:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        index_TK, weights_TK = (choice.reshape(-1, choice.shape[-1]) for choice in (top_k_index, top_k_weights))
        sent = _Sent.of(index_TK // num_local, group)
        rows_ND = exchange_rows(hidden_TD[sent.token_N], sent.counts, sent.received, group)
        index_NK = index_TK[sent.token_N]
        chosen_NK = torch.where(index_NK // num_local == sent.rank_N[:, None], index_NK % num_local, ABSENT)
        chosen_NK = exchange_rows(chosen_NK, sent.counts, sent.received, group)
        weights_NK = exchange_rows(weights_TK[sent.token_N], sent.counts, sent.received, group)
        result_ND = _run(inner, rows_ND, chosen_NK, weights_NK)
        back_ND = exchange_rows(result_ND, sent.received, sent.counts, group)
        return torch.zeros_like(hidden_TD).index_add_(0, sent.token_N, back_ND).view_as(hidden_states)

    experts.forward = forward


class _Sent:
    """token_N, rank_N: the token of each row that leaves, and where to, sorted by rank. counts, received: rows by rank."""

    def __init__(self, token_N: Tensor, rank_N: Tensor, counts: list[int], received: list[int]) -> None:
        self.token_N, self.rank_N, self.counts, self.received = token_N, rank_N, counts, received

    @classmethod
    def of(cls, owner_TK: Tensor, group: Group) -> "_Sent":
        """A row for each rank that holds any of a token's experts."""
        ranks_R = torch.arange(group.size, device=owner_TK.device)
        rank_N, token_N = (owner_TK == ranks_R[:, None, None]).any(-1).nonzero(as_tuple=True)
        counts_R = torch.bincount(rank_N, minlength=group.size)
        received_R = exchange_counts(counts_R, group)
        return cls(token_N, rank_N, *torch.stack((counts_R, received_R)).tolist())


def _run(inner, rows_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The weighted sum over each row's experts that lie here; a row for each choice, so that nothing absent is computed."""
    row_M, choice_M = (chosen_NK != ABSENT).nonzero(as_tuple=True)
    result_ND = torch.zeros_like(rows_ND)
    if len(row_M):
        picked = row_M, choice_M
        result_ND.index_add_(0, row_M, inner(rows_ND[row_M], chosen_NK[picked][:, None], weights_NK[picked][:, None]))
    return result_ND


def num_identities(experts: nn.Module) -> int:
    """How many of the experts that a router chooses from have no weights, and return their tokens as they are."""
    return getattr(experts, "zero_expert_num", None) or 0


def keep_identities(experts: nn.Module, num_experts: int) -> None:
    """Let what experts without weights return, whose ids begin at `num_experts`, be added where the token lies."""
    inner = experts.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        is_identity_TK = top_k_index >= num_experts
        weight_T1 = top_k_weights.masked_fill(~is_identity_TK, 0).sum(-1, keepdim=True)
        result_TD = inner(hidden_states, top_k_index, top_k_weights.masked_fill(is_identity_TK, 0))
        return result_TD + (hidden_states * weight_T1).to(result_TD.dtype)

    experts.forward = forward


def _beside_identity(inner, identity: int):
    """Experts called with one choice a token, which LongCat's cannot take alone: beside that of an identity, with weight 0."""

    def forward(rows_MD: Tensor, index_M1: Tensor, weights_M1: Tensor) -> Tensor:
        index_M2 = torch.cat((index_M1, torch.full_like(index_M1, identity)), dim=1)
        return inner(rows_MD, index_M2, torch.cat((weights_M1, torch.zeros_like(weights_M1)), dim=1))

    return forward


def dispatch_dense(moe: nn.Module, num_experts: int, group: Group) -> None:
    """The same for Llama 4, whose experts take inputs that the router has scaled, as many for each expert.

    moe: with `router` (hidden [T, D] -> scores [T, num_experts], 0 where not chosen), `shared_expert` and `experts`.
    """
    experts, num_local = moe.experts, num_experts // group.size
    dense, width = experts.forward, experts.hidden_size

    def chosen_experts(rows_MD: Tensor, expert_M1: Tensor, weights_M1: Tensor) -> Tensor:
        expert_M = expert_M1[:, 0]
        order_M, counts = expert_M.argsort(stable=True), torch.bincount(expert_M, minlength=num_local)
        place_M = torch.arange(len(expert_M), device=expert_M.device) - (counts.cumsum(0) - counts)[expert_M[order_M]]
        padded = rows_MD.new_zeros(num_local, int(counts.max()), width)
        at = expert_M[order_M], place_M
        padded[at] = (rows_MD * weights_M1)[order_M]
        result_MD = torch.empty_like(rows_MD)
        result_MD[order_M] = dense(padded.view(-1, width)).view_as(padded)[at]
        return result_MD

    experts.forward = chosen_experts
    dispatch(experts, num_experts, group)

    def forward(hidden_states: Tensor):
        hidden_TD = hidden_states.reshape(-1, width)
        scores_TE, logits_TE = moe.router(hidden_TD)
        weights_TK, index_TK = scores_TE.topk(moe.top_k, dim=-1)
        return moe.shared_expert(hidden_TD) + experts(hidden_TD, index_TK, weights_TK), logits_TE

    moe.forward = forward
