"""Bandwidth and latency of collectives between ranks, as bus bandwidth.

The bus bandwidth of n ranks is the size of a collective divided by its time, times a factor after
which it equals the speed of the slowest link, whatever n is:

    all-reduce                2 (n - 1) / n    size = bytes of each rank's tensor
    all-gather, all-to-all      (n - 1) / n    size = bytes that each rank has received, its own included

Groups across nodes communicate at the same time, one per rank of a node, and may share a network card.
They are therefore judged by the sum of their bandwidths, the bandwidth of a node.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from engine.host.units import KIB, MIB, size_text
from engine.parallel.mesh import World
from engine.setup_checks.finding import Finding, ok, warning
from engine.setup_checks.rank_facts import RankFacts, names_of

ALL_REDUCE, ALL_GATHER, ALL_TO_ALL = "all-reduce", "all-gather", "all-to-all"
OPERATIONS = (ALL_REDUCE, ALL_GATHER, ALL_TO_ALL)
OF_EVERY_STEP = (ALL_REDUCE, ALL_GATHER)  # exchange gradients and weights of a draft
WITHIN, ACROSS, WHOLE = "within a node", "across nodes", "all ranks"
SIZES = {"cpu": (4 * KIB, 256 * KIB, 16 * MIB), "cuda": (4 * KIB, MIB, 16 * MIB, 256 * MIB)}
SECONDS_PER_SIZE = 0.1  # of repetitions
MOST_REPETITIONS = 50
MOST_SECONDS = 2.0  # of one collective; sizes that would take longer are left out
FREE_SHARE = 4  # a size takes at most this part of the free memory
# Bandwidth in GB/s of a rank within a node, or of a node in the network, below which the exchange of gradients and weights
# holds up training: that of a GPU on PCIe without direct access to its neighbours, of a network of 25 Gbit/s, and of a
# network of 1 Gbit/s for ranks on CPUs.
LEAST_GB_PER_S = {("cuda", WITHIN): 5.0, ("cuda", ACROSS): 2.0, ("cpu", WITHIN): 0.1, ("cpu", ACROSS): 0.1}
OUTLIER = 2.0  # a node this many times as slow as the median is named; of two nodes the faster one is the median
GRADIENT_BYTES = 840_000_000  # of a draft of 0.42 billion weights in bf16, as for a target of 8 billion
NETWORK_FIX = (
    "Choose the network with NCCL_SOCKET_IFNAME and NCCL_IB_HCA (docs/multi_node.md); NCCL_DEBUG=INFO shows which one is in use"
)
NODE_FIX = "Look at `nvidia-smi topo -m` for how the GPUs are connected, and at NCCL_DEBUG=INFO for how NCCL connects them"
MEMORY_FIX = "Run `nvidia-smi` there, and end the processes that hold the memory"
OUTLIER_FIX = "Compare this node with the others (`nvidia-smi topo -m`, `nvidia-smi -q -d CLOCK,POWER`)"
CPU_FIX = "Choose the network with GLOO_SOCKET_IFNAME (docs/multi_node.md)"


@dataclass(frozen=True)
class Scope:
    """Groups of ranks that communicate at the same time.

    name: `WITHIN`, `ACROSS` or `WHOLE`. groups: the ranks of each group. num_ranks: ranks of each group.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.groups[0])

    @property
    def has_all_ranks(self) -> bool:
        """Whether there is one group, of all ranks."""
        return len(self.groups) == 1


@dataclass(frozen=True)
class LinkSpeed:
    """The time of one collective of one size.

    scope: name of the groups that communicated. num_ranks: of each group. num_bytes: size, as defined above.
    seconds_of_groups: the slowest rank's time in each group.
    """

    operation: str
    scope: str
    num_ranks: int
    num_bytes: int
    seconds_of_groups: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return max(self.seconds_of_groups)

    @property
    def gb_per_s(self) -> float:
        """Bus bandwidth of the slowest group, in 1e9 bytes per second."""
        return self.num_bytes / self.seconds * bus_factor(self.operation, self.num_ranks) / 1e9

    @property
    def node_gb_per_s(self) -> float:
        """Bandwidth of a node, in 1e9 bytes per second: the sum over the groups if each of them has a rank of every node."""
        return self.gb_per_s * len(self.seconds_of_groups) if self.scope == ACROSS else self.gb_per_s


def bus_factor(operation: str, num_ranks: int) -> float:
    """Return the bus bandwidth divided by size per time."""
    share = (num_ranks - 1) / num_ranks
    return 2 * share if operation == ALL_REDUCE else share


def scopes_of(size: int, local_size: int) -> list[Scope]:
    """Return the groups to measure: all ranks, and with several nodes also those within nodes and across nodes."""
    every_rank = range(size)
    num_nodes = -(-size // local_size)
    if size == 1:
        return []
    whole = tuple(every_rank)
    if num_nodes == 1:
        return [Scope(WITHIN, (whole,))]
    if local_size == 1:
        return [Scope(ACROSS, (whole,))]
    nodes = tuple(tuple(every_rank[first : first + local_size]) for first in range(0, size, local_size))
    across = tuple(tuple(every_rank[local_rank::local_size]) for local_rank in range(local_size))
    return [Scope(WHOLE, (whole,)), Scope(WITHIN, nodes), Scope(ACROSS, across)]


def free_bytes_of(rank: RankFacts) -> int:
    """Return the memory that is free on the device of a rank; 0 if it cannot be read."""
    machine = rank.machine
    return machine.free_memory_bytes // rank.local_size if machine.gpu is None else machine.gpu.free_bytes


def fitting_sizes(device_type: str, free_bytes: int) -> list[int]:
    """Return the sizes to measure if every rank has `free_bytes` of memory."""
    return [size for size in SIZES[device_type] if FREE_SHARE * size <= free_bytes]


def judge_memory(ranks: Sequence[RankFacts], device_type: str) -> Finding | None:
    """Return the finding that links cannot be measured, because of ranks without memory; None = they can be."""
    without = [rank for rank in ranks if not fitting_sizes(device_type, free_bytes_of(rank))]
    if not without:
        return None
    text = f"not measured: {names_of(without)} have no free memory, or it cannot be read"
    return warning("links", text, MEMORY_FIX)


def measure_scope(
    world: World, scope: Scope, free_bytes: int, timeout_s: float, busy: Callable[[str], None]
) -> list[LinkSpeed]:
    """Measure all collectives of a scope; a collective of all ranks.

    free_bytes: memory that every rank has. busy: shows a text.
    """
    group = None
    number = 0
    timeout = timedelta(seconds=timeout_s)
    for index, ranks in enumerate(scope.groups):
        made = distributed.new_group(list(ranks), timeout)
        if world.rank in ranks:
            group = made
            number = index
    assert group is not None, "every rank is in one group"
    speeds = []
    for operation in OPERATIONS:
        of_one: list[LinkSpeed] = []
        for num_bytes in fitting_sizes(world.device.type, free_bytes):
            if predicted_seconds(of_one, num_bytes) > MOST_SECONDS:
                break
            busy(f"{operation} {scope.name}, {size_text(num_bytes)}")
            collective, actual_bytes = _collective(operation, num_bytes, scope.num_ranks, world.device, group)
            own_seconds = _time(collective, world)
            by_group: dict[int, float] = {}
            for index, seconds in world.gather((number, own_seconds)):
                by_group[index] = max(seconds, by_group.get(index, 0.0))
            times = tuple(seconds for _, seconds in sorted(by_group.items()))
            of_one.append(LinkSpeed(operation, scope.name, scope.num_ranks, actual_bytes, times))
        speeds += of_one
    distributed.destroy_process_group(group)  # whose buffers take memory of the device
    return speeds


def predicted_seconds(measured: Sequence[LinkSpeed], num_bytes: int) -> float:
    """Return the time of a larger collective, from smaller ones; 0 if none was measured.

    The first is so small that its time is the latency, which does not grow with the size.
    """
    if not measured:
        return 0.0
    latency_s = measured[0].seconds
    last = measured[-1]
    return latency_s + max(0.0, last.seconds - latency_s) * num_bytes / last.num_bytes


def _collective(
    operation: str, num_bytes: int, num_ranks: int, device: torch.device, group: distributed.ProcessGroup
) -> tuple[Callable[[], object], int]:
    """Return a collective of about `num_bytes`, and its exact size in bytes."""
    length = max(1, num_bytes // 4 // num_ranks)
    whole = torch.zeros(length * num_ranks, dtype=torch.float32, device=device)
    if operation == ALL_REDUCE:
        return lambda: distributed.all_reduce(whole, group=group), whole.nbytes
    if operation == ALL_GATHER:
        part = whole[:length].clone()
        return lambda: distributed.all_gather_into_tensor(whole, part, group=group), whole.nbytes
    sent = torch.zeros_like(whole)
    return lambda: distributed.all_to_all_single(whole, sent, group=group), whole.nbytes


def _time(collective: Callable[[], object], world: World) -> float:
    """Return the mean time of a collective on this rank, in seconds; a collective of all ranks."""
    _run(collective, 1, world)  # connects the ranks
    slowest = torch.tensor([_run(collective, 1, world)], dtype=torch.float64, device=world.device)
    repetitions = _repetitions(world, slowest)
    return _run(collective, repetitions, world) / repetitions


def _repetitions(world: World, seconds: Tensor) -> int:
    """Return how often to repeat a collective, the same on all ranks."""
    distributed.all_reduce(seconds, op=distributed.ReduceOp.MAX)
    wanted = int(SECONDS_PER_SIZE / max(seconds.item(), 1e-6))
    return min(max(wanted, 1), MOST_REPETITIONS)


def _run(collective: Callable[[], object], repetitions: int, world: World) -> float:
    """Return the seconds of some repetitions, which all ranks begin together."""
    world.barrier()
    _wait(world.device)
    began_s = time.perf_counter()
    for _ in range(repetitions):
        collective()
    _wait(world.device)
    return time.perf_counter() - began_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judge_links(speeds: Sequence[LinkSpeed], device_type: str, ranks: Sequence[RankFacts], scope: Scope) -> list[Finding]:
    """Return a finding per collective of one scope. speeds: those of the scope."""
    findings = []
    for operation in OPERATIONS:
        of_one = [speed for speed in speeds if speed.operation == operation]
        if of_one:
            findings.append(_judge_operation(of_one, device_type, ranks, scope))
    return findings


def _judge_operation(speeds: Sequence[LinkSpeed], device_type: str, ranks: Sequence[RankFacts], scope: Scope) -> Finding:
    """Return the finding on one collective. speeds: by size, the smallest first."""
    operation = speeds[0].operation
    largest = speeds[-1]
    text = _figures(speeds, scope)
    median_s = statistics.median_low(largest.seconds_of_groups)
    slow = [index for index, seconds in enumerate(largest.seconds_of_groups) if seconds > OUTLIER * median_s]
    if slow and scope.name == WITHIN:
        members = [rank for rank in ranks if any(rank.rank in scope.groups[index] for index in slow)]
        text = f"{text}; {names_of(members)} took {largest.seconds / median_s:.1f} times as long as other nodes"
        return warning(operation, text, OUTLIER_FIX)
    if len(speeds) == 1:
        return warning(operation, text, _fix_of(device_type, scope))
    least = LEAST_GB_PER_S[device_type, WITHIN if scope.name == WITHIN else ACROSS]
    if operation not in OF_EVERY_STEP or largest.node_gb_per_s >= least:
        return ok(operation, text)
    text = f"{text}; less than {least:g} GB/s holds up training"
    if operation == ALL_REDUCE and scope.has_all_ranks:
        gradient_s = GRADIENT_BYTES * bus_factor(ALL_REDUCE, largest.num_ranks) / largest.gb_per_s / 1e9
        text = f"{text}: the gradients of a draft for an 8B target take {gradient_s:.2g} s per step"
    return warning(operation, text, _fix_of(device_type, scope))


def _figures(speeds: Sequence[LinkSpeed], scope: Scope) -> str:
    """Return the figures of one collective as text."""
    largest = speeds[-1]
    shape = f"{largest.num_ranks} ranks {scope.name}" if scope.name != WHOLE else f"all {largest.num_ranks} ranks"
    is_shared = scope.name == ACROSS and not scope.has_all_ranks
    if is_shared:
        shape = f"{shape}, {len(scope.groups)} groups at the same time"
    rates = ", ".join(f"{speed.gb_per_s:.3g} GB/s at {size_text(speed.num_bytes)}" for speed in reversed(speeds[1:]))
    if rates and is_shared:
        rates = f"{rates} per group, {largest.node_gb_per_s:.3g} GB/s per node"
    return f"{shape}: {rates or 'bandwidth was not measured'}; latency {speeds[0].seconds * 1e6:,.0f} us"


def _fix_of(device_type: str, scope: Scope) -> str:
    if device_type == "cpu":
        return CPU_FIX
    return NODE_FIX if scope.name == WITHIN else NETWORK_FIX
