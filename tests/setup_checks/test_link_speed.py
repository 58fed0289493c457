"""Bus bandwidths by definition, groups of ranks within and across nodes, and a real measurement."""

import pytest

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
    measure_scope,
    predicted_seconds,
    scopes_of,
)
from tests.distributed import run_ranks
from tests.setup_facts import make_ranks

WITHIN_NODES = scopes_of(8, 4)[1]


def speeds(seconds: float, scope: Scope = WITHIN_NODES, slow: float = 1.0) -> list[LinkSpeed]:
    """An all-reduce of 8 GB and a small one before it; the last group takes `slow` times as long."""
    times = (*(seconds for _ in scope.groups[1:]), slow * seconds)
    small = LinkSpeed(ALL_REDUCE, scope.name, scope.num_ranks, 4096, (1e-5,))
    return [small, LinkSpeed(ALL_REDUCE, scope.name, scope.num_ranks, 8_000_000_000, times)]


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


def test_slow_links_and_slow_nodes_are_warnings():
    ranks = make_ranks()
    (fast,) = judge_links(speeds(0.1), "cuda", ranks, WITHIN_NODES)
    assert fast.status == "ok" and "120 GB/s at" in fast.text and "latency 10 us" in fast.text
    (slow,) = judge_links(speeds(4.0), "cuda", ranks, WITHIN_NODES)
    assert slow.status == "warning" and "3 GB/s" in slow.text and "0.42 s per step" in slow.text and "topo" in slow.fix
    across = scopes_of(8, 4)[2]
    (network,) = judge_links(speeds(8.0, across), "cuda", ranks, across)
    assert network.status == "warning" and "NCCL_SOCKET_IFNAME" in network.fix
    three = scopes_of(12, 4)[1]
    (outlier,) = judge_links(speeds(0.1, three, slow=3.0), "cuda", make_ranks(num_nodes=3), three)
    assert outlier.status == "warning" and "node2 (ranks 8-11) took 3.0 times as long" in outlier.text


def measure(world: World) -> list[LinkSpeed]:
    link_speed.SECONDS_PER_SIZE = 0.0  # once is enough for a test
    measured = []
    for scope in scopes_of(world.size, 2):
        measured += measure_scope(world, scope, 8 << 20, 60, lambda text: None)
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
