"""Dispatch of tokens to experts: the same sums as one process gives, however tokens fall."""

from unittest import mock

import pytest
import torch
from torch import nn

from engine.parallel import experts as module
from engine.parallel.experts import dispatch, keep_identities
from engine.parallel.mesh import TargetMesh
from tests.distributed import run_ranks

EXPERTS, WIDTH, RANKS = 8, 6, 4
COUNTS = (5, 0, 9, 1)


class Experts(nn.Module):
    """Experts as Transformers calls them, written out; counts how many tokens each computes."""

    def __init__(self, weights_EDD: torch.Tensor) -> None:
        super().__init__()
        self.weights_EDD, self.computed = weights_EDD, 0

    def forward(self, hidden_states, top_k_index, top_k_weights):
        self.computed += top_k_index.numel()
        picked = self.weights_EDD[top_k_index]
        return torch.einsum("td,tkdf,tk->tf", hidden_states, picked, top_k_weights)


def choices(kind: str, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    count = COUNTS[rank]
    scores = torch.rand(count, EXPERTS, generator=generator)
    if kind == "all to one rank":
        scores[:, 2:4] += 10
    if kind == "some empty":
        scores[:, ::2] -= 10
    weights, index = scores.topk(2, dim=-1)
    return torch.randn(count, WIDTH, generator=generator), index, weights


def run(world, kind: str, ep: int) -> tuple[torch.Tensor, int, int]:
    mesh = TargetMesh.make(world, 1, ep)
    weights_EDD = torch.randn(EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    local = EXPERTS // ep
    experts = Experts(weights_EDD[mesh.ep.rank * local : (mesh.ep.rank + 1) * local])
    dispatch(experts, EXPERTS, mesh.ep)
    hidden, index, top = choices(kind, world.rank)
    exchange, moved = module.exchange_rows, []

    def counted(rows, *arguments):
        moved.append(rows.shape[0] if rows.shape[-1] == WIDTH else 0)
        return exchange(rows, *arguments)

    with mock.patch.object(module, "exchange_rows", counted):
        return experts.forward(hidden, index, top), experts.computed, sum(moved)


@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("kind", ["even", "all to one rank", "some empty"])
def test_no_token_is_dropped_and_none_computed_twice(kind, ep):
    whole = Experts(torch.randn(EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))
    results = run_ranks(run, RANKS, kind, ep)
    for rank, (found, *_) in enumerate(results):
        torch.testing.assert_close(found, whole(*choices(kind, rank)))
    assert sum(computed for _, computed, _ in results) == 2 * sum(COUNTS)
    owners = [choices(kind, rank)[1] // (EXPERTS // ep) for rank in range(RANKS)]
    once_a_rank = sum(len(set(row.tolist())) for owner_TK in owners for row in owner_TK)
    assert sum(moved for *_, moved in results) == 2 * once_a_rank, "there and back, however many experts of a rank it chose"


class WithIdentities(Experts):
    """Such experts behind which come some that return their tokens, as LongCat's are."""

    zero_expert_num = 4

    def forward(self, hidden_states, top_k_index, top_k_weights):
        assert top_k_index.shape[1] > 1, "LongCat's code drops the dimension of a single choice"
        is_identity_TK = top_k_index >= len(self.weights_EDD)
        chosen_TK = top_k_index.masked_fill(is_identity_TK, 0)
        results_TD = super().forward(hidden_states, chosen_TK, top_k_weights.masked_fill(is_identity_TK, 0))
        return results_TD + hidden_states * top_k_weights.masked_fill(~is_identity_TK, 0).sum(-1, keepdim=True)


def run_with_identities(world, ep: int) -> float:
    """The largest difference from one process of experts that a group shares, some of which have no weights."""
    mesh = TargetMesh.make(world, 1, ep)
    weights_EDD = torch.randn(EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(world.rank)
    weights_TK, index_TK = torch.rand(7, EXPERTS + 4, generator=generator).topk(3, dim=-1)
    hidden_TD = torch.randn(7, WIDTH, generator=generator)
    local = EXPERTS // ep
    experts = WithIdentities(weights_EDD[mesh.ep.rank * local : (mesh.ep.rank + 1) * local])
    dispatch(experts, EXPERTS, mesh.ep)
    keep_identities(experts, EXPERTS)
    expected_TD = WithIdentities(weights_EDD)(hidden_TD, index_TK, weights_TK)
    return (experts.forward(hidden_TD, index_TK, weights_TK) - expected_TD).abs().max().item()


@pytest.mark.parametrize("ep", [2, 4])
def test_experts_without_weights_return_tokens_where_they_lie(ep):
    assert max(run_ranks(run_with_identities, RANKS, ep)) < 1e-5
