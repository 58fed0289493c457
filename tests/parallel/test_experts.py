"""Dispatch of tokens to experts: the same sums as one process gives, however tokens fall."""

from contextlib import ExitStack
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import distributed, nn

from engine.parallel.expert_products import LocalExperts
from engine.parallel.experts import Record, dispatch, keep_identities
from engine.parallel.mesh import TargetMesh
from tests.device_reads import DeviceReads
from tests.distributed import run_ranks
from tests.parallel.grouped_experts import WIDTH as GROUPED_WIDTH
from tests.parallel.grouped_experts import grouped_experts, grouped_inputs

EXPERTS = 8
WIDTH = 6
RANKS = 4
COUNTS = (5, 0, 9, 1)
KINDS = ("even", "all to one rank", "some empty")


class Experts(nn.Module):
    """Experts as Transformers calls them, written out; counts how many tokens each computes."""

    def __init__(self, weights_EDD: torch.Tensor) -> None:
        super().__init__()
        self.weights_EDD = weights_EDD
        self.computed = 0

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
    index = scores.topk(2, dim=-1).indices
    weights = torch.randint(1, 5, index.shape, generator=generator).float()
    return torch.randint(-8, 9, (count, WIDTH), generator=generator).float(), index, weights


class Sent(NamedTuple):
    """What a rank asked of torch.distributed, in order, and the bytes of rows that it sent to all ranks, itself included."""

    log: list[str]
    num_bytes: int


class Watch(ExitStack):
    """While active, notes the all-to-alls of a rank between the products of its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.log = []
        self.num_bytes = 0

    def __enter__(self) -> "Watch":
        self.enter_context(mock.patch.object(distributed, "all_to_all_single", self._note(distributed.all_to_all_single)))
        self.enter_context(mock.patch.object(LocalExperts, "__call__", self._note_products(LocalExperts.__call__)))
        return self

    def _note(self, inner):
        def noted(received, sent, *splits, group, async_op=False):
            self.log.append("rows" if async_op else "counts")
            self.num_bytes += sent.nbytes if async_op else 0
            return inner(received, sent, *splits, group=group, async_op=async_op)

        return noted

    def _note_products(self, inner):
        def noted(local, *arguments):
            self.log.append("products")
            return inner(local, *arguments)

        return noted


def run(world, kinds: tuple[str, ...], ep: int, parts: tuple[int, ...]) -> dict[tuple[str, int], tuple]:
    mesh = TargetMesh.make(world, 1, ep)
    found = {}
    weights_EDD = whole_weights()
    local = EXPERTS // ep
    for kind in kinds:
        for count in parts:
            experts = Experts(weights_EDD[mesh.ep.rank * local : (mesh.ep.rank + 1) * local])
            dispatch(experts, EXPERTS, mesh.ep, count)
            with Watch() as watch:
                result_TD = experts.forward(*choices(kind, world.rank))
            found[kind, count] = result_TD, experts.computed, Sent(watch.log, watch.num_bytes)
    return found


def whole_weights() -> torch.Tensor:
    """Whole numbers, so that sums are exact in any order."""
    return torch.randint(-4, 5, (EXPERTS, WIDTH, WIDTH), generator=torch.Generator().manual_seed(9)).float()


@pytest.mark.parametrize("ep", [2, 4])
def test_no_token_is_dropped_and_none_computed_twice(ep):
    whole = Experts(whole_weights())
    parts = (1, 2, 3)
    results = run_ranks(run, RANKS, KINDS, ep, parts)
    for kind in KINDS:
        owners = [choices(kind, rank)[1] // (EXPERTS // ep) for rank in range(RANKS)]
        once_a_rank = sum(len(set(row.tolist())) for owner_TK in owners for row in owner_TK)
        for count in parts:
            for rank, found in enumerate(results):
                assert torch.equal(found[kind, count][0], whole(*choices(kind, rank))), "in parts as in one"
            assert sum(found[kind, count][1] for found in results) == 2 * sum(COUNTS)
            there = Record(WIDTH, torch.float32, 2, False).num_bytes
            back = WIDTH * 4
            sent = sum(found[kind, count][2].num_bytes for found in results)
            assert sent == once_a_rank * (there + back), "there and back, however many experts of a rank it chose"


def test_every_rank_issues_its_exchanges_in_one_order_with_products_between_them():
    results = run_ranks(run, RANKS, ("all to one rank",), 2, (1, 3))
    one, three = ([found["all to one rank", count][2].log for found in results] for count in (1, 3))
    there = "rows"
    back = "rows"
    multiply = "products"
    assert one[0] == ["counts", there, multiply, back]
    # the next part's rows are under way while a part is multiplied
    assert three[0] == ["counts", there, there, multiply, back, there, multiply, back, multiply, back]
    assert all(log == one[0] for log in one) and all(log == three[0] for log in three)


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


def read_and_rounded(world) -> dict:
    """Reads by the host in a forward of grouped experts that two ranks share, and results of every form of exchange."""
    mesh = TargetMesh.make(world, 1, 2)
    found = {}
    hidden_TD, index_TK, weight_TK = grouped_inputs(world.rank)
    for parts, fp8_exchange in ((1, "none"), (3, "none"), (2, "dispatch"), (2, "both")):
        experts = grouped_experts()
        half = EXPERTS // 2
        for name, weight in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(weight[mesh.ep.rank * half : (mesh.ep.rank + 1) * half], requires_grad=False))
        experts.num_experts = half
        dispatch(experts, EXPERTS, mesh.ep, parts, fp8_exchange)
        with DeviceReads() as reads, Watch() as watch:
            result_TD = experts.forward(hidden_TD, index_TK, weight_TK)
        found[parts, fp8_exchange] = result_TD, reads.names, watch.num_bytes
    return found


def test_the_host_reads_once_a_layer_and_fp8_rows_take_fewer_bytes_within_their_error():
    results = run_ranks(read_and_rounded, 2)
    for rank, found in enumerate(results):
        inputs = grouped_inputs(rank)
        expected_TD = grouped_experts()(*inputs)
        for (parts, fp8_exchange), (result_TD, reads, _) in found.items():
            assert reads == ["tolist"], (parts, fp8_exchange)
            error = (result_TD - expected_TD).norm() / expected_TD.norm()
            if fp8_exchange == "none":
                assert error < 1e-6
            else:
                # Each value is off by at most 1/16, and errors of values are independent: about 2.6% of a row's norm. Products
                # and the gate pass on about twice as much; a wrong scale or a wrong row would give an error near 1.
                assert 1e-3 < error < 0.1
    none, dispatched, both = (sum(found[key][2] for found in results) for key in ((1, "none"), (2, "dispatch"), (2, "both")))
    # A record is a multiple of 64 bytes: rows of fp32 with their choices, rows of fp8 with them, and those alone.
    bytes_both_ways = {256 + 4 * GROUPED_WIDTH: none, 128 + 4 * GROUPED_WIDTH: dispatched, 128 + 64: both}
    num_rows = {sent / of_a_row for of_a_row, sent in bytes_both_ways.items()}
    num_tokens = sum(len(grouped_inputs(rank)[0]) for rank in range(2))
    assert len(num_rows) == 1 and num_rows.pop() <= 2 * num_tokens


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_of_a_record_do_not_overlap(dtype, is_fp8):
    for width, num_choices in ((1, 1), (7, 3), (64, 8)):
        record = Record(width, dtype, num_choices, is_fp8)
        buffer_NB = record.empty(2, torch.device("cpu")).zero_()
        parts = [record.rows(buffer_NB).view(torch.uint8), record.weight(buffer_NB), record.index(buffer_NB)]
        parts += [record.scale(buffer_NB)] if is_fp8 else []
        for number, part in enumerate(parts):
            assert not part.any(), "another part lies here"
            part.fill_(number + 1)
        assert [part.unique().tolist() for part in parts] == [[number + 1] for number in range(len(parts))]
