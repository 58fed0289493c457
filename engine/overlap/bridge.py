"""Connection between the ranks that run the target and those that train the draft (`overlap.placement=split`).

Both sides are worlds of their own, each with its own default process group, because DeepSpeed
communicates over a whole world. The bridge is one more process group of all ranks, over which
states travel from rank to rank.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from engine.parallel.mesh import World

CREDIT, SECONDS, DATA, OBJECT_SIZE, OBJECT = range(1, 6)  # tags of messages


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

    def size_of(self, rank: int) -> int:
        """Return the number of ranks of the side to which `rank` belongs."""
        return self.num_target if self.is_target(rank) else self.num_draft

    def producer_of(self, draft_rank: int, index: int) -> int:
        """Return the rank that prepares batch `index` of a draft rank.

        The batches of all draft ranks form one sequence, in the order in which they are trained on:
        first those of the first micro-batch, by draft rank. Target ranks take them in turn.
        """
        return self.num_draft + (index * self.num_draft + draft_rank) % self.num_target

    def batches_of(self, target_rank: int, num_batches: int) -> list[tuple[int, int]]:
        """Return the draft rank and the index of every batch that a target rank prepares, in order.

        target_rank: number of the rank within its side. num_batches: batches of each draft rank.
        """
        numbers = range(target_rank, num_batches * self.num_draft, self.num_target)
        return [(number % self.num_draft, number // self.num_draft) for number in numbers]

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
            self._device_group = distributed.ProcessGroupNCCL(nccl_store, rank, sides.size, options)
        self._sending: list[tuple[Any, Tensor]] = []

    def barrier(self) -> None:
        """Wait for all ranks of the job."""
        self._host.barrier().wait()

    def send_data(self, block: Tensor, to: int) -> "Arrival":
        """Start to send a block of device memory; it may be changed once the arrival is complete."""
        return Arrival(self._device_group.send([block], to, DATA), self._name(to), self.timeout)

    def receive_data(self, block: Tensor, source: int) -> "Arrival":
        """Start to receive a block of device memory."""
        return Arrival(self._device_group.recv([block], source, DATA), self._name(source), self.timeout)

    def send_number(self, number: float, to: int, tag: int) -> None:
        """Start to send a number."""
        message = torch.tensor([number], dtype=torch.float64)
        self._keep(self._host.send([message], to, tag), message)

    def receive_number(self, source: int, tag: int) -> "NumberArrival":
        """Start to receive a number."""
        message = torch.zeros(1, dtype=torch.float64)
        return NumberArrival(Arrival(self._host.recv([message], source, tag), self._name(source), self.timeout), message)

    def send(self, value: Any, to: int) -> None:
        """Send a picklable value, with tensors on the host, and wait until it has arrived."""
        written = io.BytesIO()
        torch.save(value, written)
        content = torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)
        size = torch.tensor([content.numel()], dtype=torch.int64)
        Arrival(self._host.send([size], to, OBJECT_SIZE), self._name(to), self.timeout).wait()
        Arrival(self._host.send([content], to, OBJECT), self._name(to), self.timeout).wait()

    def receive(self, source: int, device: torch.device | str = "cpu", patience: timedelta | None = None) -> Any:
        """Return a value that `send` sends. Its tensors are moved to `device`.

        patience: how long to wait for it; None = the timeout of the bridge.
        """
        size = torch.zeros(1, dtype=torch.int64)
        first = Arrival(self._host.recv([size], source, OBJECT_SIZE), self._name(source), patience or self.timeout)
        first.wait()
        content = torch.empty(int(size), dtype=torch.uint8)
        Arrival(self._host.recv([content], source, OBJECT), self._name(source), self.timeout).wait()
        return torch.load(io.BytesIO(content.numpy().tobytes()), map_location=device, weights_only=False)

    def _keep(self, work: Any, message: Tensor) -> None:
        """Keep a message until it has been sent."""
        self._sending = [(other, kept) for other, kept in self._sending if not other.is_completed()]
        self._sending.append((work, message))

    def _name(self, rank: int) -> str:
        side = "target" if self.sides.is_target(rank) else "draft"
        return f"rank {rank} ({side} rank {rank - self.sides.first_of(rank)})"


class Arrival:
    """A message on its way."""

    def __init__(self, work: Any, other: str, timeout: timedelta) -> None:
        self._work = work
        self._other = other
        self._timeout = timeout

    def wait(self) -> None:
        """Wait for the message; on a GPU the current stream waits, not the host.

        Raises OtherSideError that names the other rank if it has ended or does not answer.
        """
        try:
            self._work.wait(self._timeout)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            problem = f"{self._other} has ended, or did not answer for {self._timeout.total_seconds():.0f} s"
            raise OtherSideError(f"{problem} ({reason}); its own message says why") from error


class NumberArrival:
    """A number on its way."""

    def __init__(self, arrival: Arrival, message: Tensor) -> None:
        self._arrival = arrival
        self._message = message

    def wait(self) -> float:
        self._arrival.wait()
        return self._message.item()


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
        local_size=min(whole.local_size, size),
        first_device=whole.local_rank - (whole.rank - first_on_node),
    )


def join_sides(
    whole: World, sides: Sides, timeout_s: int, connect: Callable[[World, distributed.Store], None]
) -> tuple[World, Bridge]:
    """Give each side a world of its own, and connect them; a collective of all ranks of the job.

    whole: all ranks of the job. connect: joins the default process group of a world through a store.
    """
    store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    side = "target" if sides.is_target(whole.rank) else "draft"
    own = own_world(whole, sides)
    connect(own, distributed.PrefixStore(side, store))
    return own, Bridge(sides, whole.rank, store, timeout_s, whole.device)
