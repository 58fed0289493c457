"""Connection between the ranks that run the target and those that train the draft (`overlap.placement=split`).

Both sides are worlds of their own, each with its own default process group, because DeepSpeed
communicates over a whole world. The bridge is one more process group of all ranks, over which
states travel from rank to rank.
"""

import io
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from engine.parallel.mesh import World

CREDIT, SECONDS, DATA, OBJECT_SIZE, OBJECT, ANSWER = range(1, 7)  # tags of messages
KEPT_SENDS = 64  # numbers on their way to each rank; older ones have arrived


class OtherSideError(RuntimeError):
    """A rank of the other side has ended or does not answer."""


@dataclass(frozen=True)
class Sides:
    """Division of a job's ranks: the first ones train the draft, the others run the target.

    num_draft, num_target: ranks of each side. replica_size: ranks that run one copy of the target together.
    """

    num_draft: int
    num_target: int
    replica_size: int = 1

    def __post_init__(self) -> None:
        assert self.num_draft > 0 and self.num_target > 0 and self.num_target % self.replica_size == 0

    @property
    def size(self) -> int:
        return self.num_draft + self.num_target

    def is_target(self, rank: int) -> bool:
        return rank >= self.num_draft

    def first_of(self, rank: int) -> int:
        """Return the first rank of the side to which `rank` belongs."""
        return self.num_draft if self.is_target(rank) else 0

    def role_of(self, rank: int) -> str:
        """Return the side of a rank and its number on this side, such as "target rank 0"."""
        side = "target" if self.is_target(rank) else "draft"
        return f"{side} rank {rank - self.first_of(rank)}"

    def size_of(self, rank: int) -> int:
        """Return the number of ranks of the side to which `rank` belongs."""
        return self.num_target if self.is_target(rank) else self.num_draft

    def producer_of(self, draft_rank: int, index: int) -> int:
        """Return the rank that prepares batch `index` of a draft rank.

        The batches of all draft ranks form one sequence, in the order in which they are trained on:
        first those of the first micro-batch, by draft rank. Target ranks take them in turn.
        """
        return self.num_draft + (index * self.num_draft + draft_rank) % self.num_target

    def producers_of(self, draft_rank: int) -> list[int]:
        """Return the ranks that prepare batches of a draft rank; few, if one side's size divides the other's."""
        return sorted({self.producer_of(draft_rank, index) for index in range(self.num_target)})

    def batches_of(self, target_rank: int, num_batches: int) -> list[tuple[int, int]]:
        """Return the draft rank and the index of every batch that a target rank prepares, in order.

        target_rank: number of the rank within its side. num_batches: batches of each draft rank.
        """
        numbers = range(target_rank, num_batches * self.num_draft, self.num_target)
        return [(number % self.num_draft, number // self.num_draft) for number in numbers]

    @property
    def default_look_ahead(self) -> int:
        """Look-ahead with which every target rank has a batch to prepare while its last one is on its way."""
        return max(1 + -(-self.num_target // self.num_draft), self.least_look_ahead)

    @property
    def least_look_ahead(self) -> int:
        """Smallest look-ahead with which a replica can begin its batches.

        The ranks of a replica prepare one batch each at the same time. All of these batches must be
        admitted at once, although draft ranks may need the earlier ones to ask for the later ones.
        """
        period = self.num_draft * self.num_target
        spans = []
        for first in range(0, period, self.replica_size):
            last = first + self.replica_size - 1
            spans.append(last // self.num_draft - first // self.num_draft)
        return max(spans)


class Bridge:
    """Messages between ranks of the two sides; ranks are those of the whole job.

    On GPUs states travel over NCCL, and everything else over gloo.
    """

    def __init__(self, sides: Sides, rank: int, store: distributed.Store, timeout_s: int, device: torch.device) -> None:
        """Connect; a collective of all ranks of the job.

        timeout_s: seconds after which a rank that does not answer is an error.
        """
        self.sides = sides
        self.rank = rank
        self.timeout = timedelta(seconds=timeout_s)
        own_store = distributed.PrefixStore("bridge", store)
        self._host: Any = distributed.ProcessGroupGloo(own_store, rank, sides.size, self.timeout)
        self._device_group: Any = self._host
        if device.type == "cuda":
            nccl_store = distributed.PrefixStore("bridge_nccl", store)
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = self.timeout
            self._device_group = distributed.ProcessGroupNCCL(nccl_store, rank, sides.size, options)
        self._sending: deque[Arrival] = deque()
        if device.type == "cuda":
            self._connect_pairs(device)

    def _connect_pairs(self, device: torch.device) -> None:
        """Create the communicator of every pair of ranks that exchanges batches.

        NCCL creates it at the first message, and the host waits for the other rank then. Later, a
        rank posts the receipt of a batch before it asks the other rank for it.
        """
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        for draft_rank in range(self.sides.num_draft):
            for producer in self.sides.producers_of(draft_rank):
                if self.rank == draft_rank:
                    self.receive_data(byte, producer).wait()
                elif self.rank == producer:
                    self.send_data(byte, draft_rank).wait()
        torch.cuda.synchronize(device)

    def barrier(self) -> None:
        """Wait for all ranks of the job. Raises OtherSideError if one of them has ended."""
        try:
            self._host.barrier().wait()
        except RuntimeError as error:
            raise _ended("a rank of this job", error) from error

    def send_data(self, block: Tensor, to: int) -> "Arrival":
        """Start to send a block of device memory; it may be changed once the arrival is complete."""
        return self._start(self._device_group.send, block, to, DATA)

    def receive_data(self, block: Tensor, source: int) -> "Arrival":
        """Start to receive a block of device memory."""
        return self._start(self._device_group.recv, block, source, DATA)

    def send_number(self, number: float, to: int, tag: int) -> None:
        """Start to send a number."""
        message = torch.tensor([number], dtype=torch.float64)
        self._sending.append(self._start(self._host.send, message, to, tag))
        if len(self._sending) > KEPT_SENDS * self.sides.size:
            self._sending.popleft().wait()

    def receive_number(self, source: int, tag: int, patience: timedelta | None = None) -> "Arrival":
        """Start to receive a number. patience: how long to wait for it; None = the timeout of the bridge."""
        return self._start(self._host.recv, torch.zeros(1, dtype=torch.float64), source, tag, patience)

    def send(self, value: Any, to: int, patience: timedelta | None = None) -> None:
        """Send a picklable value, with tensors on the host, and wait until it has arrived.

        patience: how long to wait until the other rank asks for it; None = the timeout of the bridge.
        """
        written = io.BytesIO()
        torch.save(value, written)
        content = torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)
        size = torch.tensor([content.numel()], dtype=torch.int64)
        self._start(self._host.send, size, to, OBJECT_SIZE, patience).wait()
        self._start(self._host.send, content, to, OBJECT).wait()

    def receive(self, source: int, patience: timedelta | None = None) -> Any:
        """Return a value that `send` sends.

        patience: how long to wait for it; None = the timeout of the bridge.
        """
        size = torch.zeros(1, dtype=torch.int64)
        self._start(self._host.recv, size, source, OBJECT_SIZE, patience).wait()
        content = torch.empty(int(size), dtype=torch.uint8)
        self._start(self._host.recv, content, source, OBJECT).wait()
        return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=False)

    def _start(
        self,
        operation: Callable[[list[Tensor], int, int], Any],
        message: Tensor,
        other: int,
        tag: int,
        patience: timedelta | None = None,
    ) -> "Arrival":
        name = f"rank {other} ({self.sides.role_of(other)})"
        try:
            work = operation([message], other, tag)
        except RuntimeError as error:
            raise _ended(name, error) from error
        return Arrival(work, message, name, patience or self.timeout)


@dataclass(frozen=True)
class Arrival:
    """A message on its way.

    work: the operation of its process group. message: kept until it has arrived.
    other: name of the other rank. timeout: how long to wait for it.
    """

    work: Any
    message: Tensor
    other: str
    timeout: timedelta

    def wait(self) -> Tensor:
        """Wait for the message and return it; on a GPU the current stream waits, not the host.

        Raises OtherSideError that names the other rank if it has ended or does not answer.
        """
        if self.message.is_cuda:
            self.work.wait()  # with a timeout the host would wait; the process group has one of its own
            return self.message
        began = time.monotonic()
        try:
            self.work.wait(self.timeout)
        except RuntimeError as error:
            if time.monotonic() - began < self.timeout.total_seconds():
                raise _ended(self.other, error) from error
            problem = f"{self.other} did not answer for {self.timeout.total_seconds():.0f} s (parallel.timeout_s)"
            raise OtherSideError(problem) from error
        return self.message


def _ended(other: str, error: RuntimeError) -> OtherSideError:
    reason = str(error).splitlines()[0].partition(". ")[0]
    return OtherSideError(f"{other} has ended; its own message, if any, says why ({reason})")


def own_world(whole: World, sides: Sides) -> World:
    """Return the world of the side to which this rank belongs. whole: all ranks of the job."""
    first = sides.first_of(whole.rank)
    size = sides.size_of(whole.rank)
    first_on_node = max(whole.rank - whole.local_rank, first)
    return replace(
        whole,
        rank=whole.rank - first,
        size=size,
        local_rank=whole.rank - first_on_node,
        first_device=whole.local_rank - (whole.rank - first_on_node),
    )


def join_sides(
    whole: World,
    sides: Sides,
    timeout_s: int,
    store: distributed.Store,
    connect: Callable[[World, distributed.Store], None],
) -> tuple[World, Bridge]:
    """Give each side a world of its own, and connect them; a collective of all ranks of the job.

    whole: all ranks of the job. store: in which they find each other.
    connect: joins the default process group of a world through a store.
    """
    side = "target" if sides.is_target(whole.rank) else "draft"
    own = own_world(whole, sides)
    connect(own, distributed.PrefixStore(side, store))
    return own, Bridge(sides, whole.rank, store, timeout_s, whole.device)
