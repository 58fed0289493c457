"""Bus bandwidths by definition, groups of ranks within and across nodes, and a real measurement."""

from dataclasses import replace

import pytest
from torch.distributed import distributed_c10d

from engine.parallel.mesh import World
from engine.setup_checks import link_speed
from engine.setup_checks.link_speed import (
    ACROSS,
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    OPERATIONS,
    WHOLE,
    WITHIN,
    LinkSpeed,
    Scope,
    judge_links,
    judge_memory,
    measure_scope,
    predicted_seconds,
    scopes_of,
)
from tests.distributed import run_ranks
from tests.setup_facts import GPU, make_ranks, with_machine

ALL_RANKS, WITHIN_NODES, ACROSS_NODES = scopes_of(8, 4)


def speeds(seconds: float, scope: Scope = WITHIN_NODES, slow: float = 1.0, operation: str = ALL_REDUCE) -> list[LinkSpeed]:
    """A collective of 8 GB and a small one before it; the last group takes `slow` times as long."""
    times = (*(seconds for _ in scope.groups[1:]), slow * seconds)
    small = LinkSpeed(operation, scope.name, scope.num_ranks, 4096, (1e-5,))
    return [small, LinkSpeed(operation, scope.name, scope.num_ranks, 8_000_000_000, times)]


@pytest.mark.parametrize(("operation", "factor"), [(ALL_REDUCE, 1.5), (ALL_GATHER, 0.75), (ALL_TO_ALL, 0.75)])
def test_bus_bandwidth_is_that_of_the_slowest_group(operation, factor):
    assert LinkSpeed(operation, WITHIN, 4, 2_000_000_000, (0.5, 1.0)).gb_per_s == pytest.approx(2 * factor)


def test_ranks_are_grouped_within_and_across_nodes():
    assert [scope.name for scope in scopes_of(8, 4)] == [WHOLE, WITHIN, ACROSS]
    assert WITHIN_NODES.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert scopes_of(8, 4)[2].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert [scope.name for scope in scopes_of(2, 2)] == [WITHIN] and [scope.name for scope in scopes_of(2, 1)] == [ACROSS]
    assert not scopes_of(1, 1)


def test_latency_does_not_count_as_bandwidth():
    small = LinkSpeed(ALL_REDUCE, WITHIN, 2, 4 << 10, (0.05,))
    large = LinkSpeed(ALL_REDUCE, WITHIN, 2, 1 << 20, (0.15,))
    assert predicted_seconds([], 1 << 30) == 0 and predicted_seconds([small], 1 << 30) == 0.05
    assert predicted_seconds([small, large], 16 << 20) == pytest.approx(0.05 + 16 * 0.1)


def test_slow_links_are_warnings():
    ranks = make_ranks()
    (fast,) = judge_links(speeds(0.1), "cuda", ranks, WITHIN_NODES)
    assert fast.status == "ok" and "120 GB/s at" in fast.text and "latency 10 us" in fast.text
    (slow,) = judge_links(speeds(4.0), "cuda", ranks, WITHIN_NODES)
    assert slow.status == "warning" and "3 GB/s" in slow.text and "topo" in slow.fix
    (unmeasured,) = judge_links(speeds(1.0)[:1], "cuda", ranks, WITHIN_NODES)
    assert unmeasured.status == "warning" and "bandwidth was not measured" in unmeasured.text


def test_groups_that_share_a_network_are_judged_by_their_sum():
    (enough,) = judge_links(speeds(8.0, ACROSS_NODES), "cuda", make_ranks(), ACROSS_NODES)
    assert enough.status == "ok" and "4 groups at the same time: 1 GB/s at" in enough.text and "4 GB/s per node" in enough.text
    (slow,) = judge_links(speeds(20.0, ACROSS_NODES), "cuda", make_ranks(), ACROSS_NODES)
    assert slow.status == "warning" and "less than 2 GB/s" in slow.text and "NCCL_SOCKET_IFNAME" in slow.fix
    alone = scopes_of(2, 1)[0]
    (network,) = judge_links(speeds(8.0, alone), "cuda", make_ranks(local_size=1), alone)
    assert network.status == "warning" and "per node" not in network.text


def test_only_an_all_reduce_of_all_ranks_tells_the_time_of_gradients():
    def told(scope: Scope, operation: str = ALL_REDUCE) -> tuple[str, bool]:
        (finding,) = judge_links(speeds(40.0, scope, operation=operation), "cuda", make_ranks(), scope)
        return finding.status, "gradients" in finding.text

    assert told(ALL_RANKS) == ("warning", True) and told(ALL_RANKS, ALL_GATHER) == ("warning", False)
    assert told(WITHIN_NODES) == told(ACROSS_NODES) == ("warning", False)
    assert told(ALL_RANKS, ALL_TO_ALL) == ("ok", False)
    one_node = scopes_of(4, 4)[0]
    (finding,) = judge_links(speeds(4.0, one_node), "cuda", make_ranks(num_nodes=1), one_node)
    assert "0.42 s per step" in finding.text


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_a_node_that_is_slower_than_the_others_is_named(num_nodes):
    scope = scopes_of(4 * num_nodes, 4)[1]
    last = num_nodes - 1
    (outlier,) = judge_links(speeds(0.1, scope, slow=3.0), "cuda", make_ranks(num_nodes), scope)
    expected = f"node{last} (ranks {4 * last}-{4 * last + 3}) took 3.0 times as long"
    assert outlier.status == "warning" and expected in outlier.text


def test_a_rank_without_memory_is_named_and_links_are_not_skipped_silently():
    ranks = with_machine(make_ranks(), 6, gpu=replace(GPU, free_bytes=0))
    finding = judge_memory(ranks, "cuda")
    assert finding.status == "warning" and "node1 (rank 6)" in finding.text and "node0" not in finding.text
    assert judge_memory(make_ranks(), "cuda") is None
    assert judge_memory(make_ranks(gpu=None, num_gpus=0, free_memory_bytes=1 << 15), "cpu") is not None


def measure(world: World) -> list[LinkSpeed]:
    link_speed.SECONDS_PER_SIZE = 0.0  # once is enough for a test
    measured = []
    num_groups = len(distributed_c10d._world.pg_map)
    for scope in scopes_of(world.size, 2):
        measured += measure_scope(world, scope, 8 << 20, 60, lambda text: None)
    assert len(distributed_c10d._world.pg_map) == num_groups, "groups are destroyed"
    return measured


def test_four_ranks_on_two_nodes_measure_all_collectives():
    by_rank = run_ranks(measure, 4)
    assert all(measured == by_rank[0] for measured in by_rank), "all ranks have the same results"
    kinds = [(speed.scope, speed.operation, speed.num_bytes) for speed in by_rank[0]]
    expected = [
        (scope.name, operation, size) for scope in scopes_of(4, 2) for operation in OPERATIONS for size in (4096, 1 << 18)
    ]
    assert kinds == expected, "sizes of more than a quarter of the memory are left out"
    assert [len(speed.seconds_of_groups) for speed in by_rank[0]] == [1] * 6 + [2] * 12
    assert all(0 < speed.seconds < 10 and speed.gb_per_s > 0 for speed in by_rank[0])
