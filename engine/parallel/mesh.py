"""Processes of a job: rank and device of each, and the groups of ranks that run one target."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import distributed

from engine.config.sections import ParallelSection, divisors
from engine.host.pinned_copy import HostCopy

Decision = TypeVar("Decision")
PARTS_ON_A_GPU = 2  # collectives run concurrently with compute


@dataclass(frozen=True)
class World:
    """One process of a job.

    rank: 0 .. size - 1 over all nodes.
    local_rank: number of this process on its node, from 0. local_size: processes of the whole job on a node.
    shares_output: whether the ranks of all nodes see the same output folder.
    first_device: GPU of this node's rank 0; above 0 if other ranks of the job use those before it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    shares_output: bool = True
    first_device: int = 0

    @classmethod
    def alone(cls) -> "World":
        """Return the world of a job with one process."""
        return cls(rank=0, size=1, local_rank=0, local_size=1)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        return -(-self.size // self.local_size)

    @property
    def writes_output(self) -> bool:
        """Whether this process writes files that every rank reads from its own output folder."""
        return self.is_main or (not self.shares_output and self.local_rank == 0)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.first_device + self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks on every rank; a collective."""
        values = values.clone()
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def any_rank(self, flags: list[bool]) -> list[bool]:
        """Return for each flag whether it is set on any rank; a collective."""
        if self.size == 1 or not flags:
            return flags
        counts = self.sum(torch.tensor(flags, dtype=torch.int32, device=self.device))
        return [count > 0 for count in counts.tolist()]

    def start_sum(self, values: torch.Tensor) -> "PendingSum":
        """Asynchronous `sum`; call `wait` of the result to get the sum. A collective."""
        return PendingSum(values.clone(), self.size)

    def gather(self, value: Any) -> list[Any]:
        """Return one picklable value of every rank, by rank; a collective."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            distributed.all_gather_object(values, value)
        return values

    def send_from_main(self, values: torch.Tensor) -> None:
        """Overwrite a tensor on every rank with the values of rank 0; a collective."""
        if self.size > 1:
            distributed.broadcast(values, src=0)

    def decide(self, decision: Callable[[], Decision]) -> Decision:
        """Call `decision()` on rank 0 only, and return its result on every rank; a collective.

        Use it to read files whose contents all ranks must agree on. A ValueError on rank 0 is
        raised on every rank.
        """
        if self.size == 1:
            return decision()
        outcome: list[Any] = [None, None]
        failure: ValueError | None = None
        if self.is_main:
            try:
                outcome[0] = decision()
            except ValueError as error:
                failure = error
                outcome[1] = str(error)
        distributed.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        return outcome[0]

    def barrier(self) -> None:
        if self.size > 1:
            distributed.barrier()


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that all `PendingSum`s of a device use.

    PyTorch has a small pool of streams and reuses them in turn, so a stream per sum could be one
    that is in use elsewhere.
    """
    return torch.cuda.Stream(device)


class PendingSum:
    """Asynchronous `World.sum` with a copy of the result to the host.

    On a GPU the collective and the copy run on a side stream, so that later work on the current
    stream waits for neither.
    """

    def __init__(self, values: torch.Tensor, num_ranks: int) -> None:
        """Start the sum. values: overwritten, so callers must not use them afterwards."""
        self._values = values
        self._copy: HostCopy | None = None
        self._work = distributed.all_reduce(values, async_op=True) if num_ranks > 1 else None
        if not values.is_cuda:
            return
        side = _copy_stream(values.device)
        side.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(side):
            if self._work is not None:
                self._work.wait()  # the side stream waits, not the host
            self._copy = HostCopy(values)
        values.record_stream(side)

    def is_ready(self) -> bool:
        """Return whether `wait` would return at once."""
        if self._copy is not None:
            return self._copy.is_ready()
        return self._work is None or self._work.is_completed()

    def wait(self) -> torch.Tensor:
        """Return the sum as a tensor on the host."""
        if self._copy is not None:
            return self._copy.wait()
        if self._work is not None:
            self._work.wait()
        return self._values


@dataclass(frozen=True)
class Group:
    """A group of ranks: its size, this rank's number in it, and its process groups.

    process_group: for tensors on the ranks' devices.
    host_group: for data on the host, so that exchanging it does not wait for the device.
    Both are None in a group of one rank, which has no collectives.
    """

    size: int = 1
    rank: int = 0
    process_group: distributed.ProcessGroup | None = None
    host_group: distributed.ProcessGroup | None = None


@dataclass(frozen=True)
class TargetMesh:
    """Groups of ranks that run the target together.

    The ranks of a group are consecutive. Each rank contributes its own micro-batches and gets their
    hidden states back.

    PyTorch's `DeviceMesh` is not used. It takes the default process group for a dimension as large
    as the world, but the thread that runs the target ahead must not issue collectives on the group
    that ZeRO uses. One of tp and ep also contains the other, which is not a grid of ranks.

    tp: the group that shares attention, dense MLPs and the head.
    ep: the group that shares the experts.
    parts: chunks per sharded layer, so that communication of one overlaps with compute of another.
    fp8_exchange: `ParallelSection.fp8_exchange`.
    """

    tp: Group = Group()
    ep: Group = Group()
    parts: int = 1
    fp8_exchange: str = "none"

    @classmethod
    def make(
        cls,
        world: World,
        tp_size: int,
        ep_size: int,
        timeout_s: int | None = None,
        parts: int = 1,
        fp8_exchange: str = "none",
    ) -> "TargetMesh":
        """Create the process groups of a rank; a collective of all ranks.

        All ranks must pass the same sizes.
        timeout_s: seconds after which a stuck collective of the groups ends the job; None =
        PyTorch's default.
        Raises ValueError if a size does not divide the number of ranks, or neither size divides the
        other. The message lists sizes that work.
        """
        check_sizes(world.size, tp_size, ep_size)
        tp, ep = (_own_group(world, size, timeout_s) for size in (tp_size, ep_size))
        return cls(tp, ep, parts, fp8_exchange)

    @classmethod
    def of(cls, parallel: ParallelSection, world: World) -> "TargetMesh":
        """Create the mesh that a recipe asks for; a collective with the errors of `make`."""
        parts = parallel.exchange_parts or (1 if world.device.type == "cpu" else PARTS_ON_A_GPU)
        return cls.make(world, parallel.tp_size, parallel.ep_size, parallel.timeout_s, parts, parallel.fp8_exchange)

    @property
    def whole(self) -> Group:
        """The ranks that hold one copy of the target: the larger group contains the other."""
        return max(self.tp, self.ep, key=lambda group: group.size)

    @property
    def size(self) -> int:
        return self.whole.size


ALONE = TargetMesh()


def check_sizes(num_ranks: int, tp_size: int, ep_size: int) -> None:
    """Raise ValueError unless both sizes divide the number of ranks and one size divides the other.

    The message lists sizes that work.
    """
    fitting = divisors(num_ranks)
    for name, size in (("tp_size", tp_size), ("ep_size", ep_size)):
        if size not in fitting:
            raise ValueError(f"parallel.{name}={size} does not divide {num_ranks} ranks; use one of {fitting}")
    if tp_size % ep_size and ep_size % tp_size:
        fitting = [size for size in fitting if size % tp_size == 0 or tp_size % size == 0]
        raise ValueError(f"parallel.ep_size={ep_size} and tp_size={tp_size}: one must divide the other; use one of {fitting}")


def _own_group(world: World, size: int, timeout_s: int | None) -> Group:
    if size == 1:
        return Group()
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    parts = [range(first, first + size) for first in range(0, world.size, size)]

    def own(backend: str | None = None) -> distributed.ProcessGroup:
        groups = [distributed.new_group(part, timeout, backend, group_desc="target") for part in parts]
        return groups[world.rank // size]

    group = own()
    return Group(size, world.rank % size, group, group if world.device.type == "cpu" else own("gloo"))
