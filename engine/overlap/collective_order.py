"""Check that the order in which ranks issue their collectives cannot deadlock; for debugging."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from engine.parallel.mesh import World

Result = TypeVar("Result")


class CollectiveOrderError(RuntimeError):
    """Ranks have issued collectives in different orders."""


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has issued.

    name: of the operation. group: description of its process group. ranks: that take part.
    """

    name: str
    group: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} of the group {self.group!r} of ranks {list(self.ranks)}"


class CollectiveOrder:
    """Records the collectives that this rank issues, and checks that their order on all ranks cannot deadlock.

    Collectives on different communicators can deadlock on GPUs if two ranks issue them in different
    orders.
    """

    def __init__(self) -> None:
        self.issued: list[Collective] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager that records the collectives which the calling thread issues."""
        with _Recorder(self.issued):
            yield

    def recorded(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Return a function that records the collectives of its calls, from any thread."""

        def call(*arguments: Any) -> Result:
            with self.recording():
                return function(*arguments)

        return call

    def compare(self, world: World) -> None:
        """Check what all ranks have recorded since the last call; a collective, which is not recorded.

        Raises CollectiveOrderError that names two ranks which would wait for each other.
        """
        issued = list(self.issued)
        self.issued.clear()
        with _not_recording():
            everyone = world.gather(issued)
        problem = find_deadlock(everyone)
        if problem is not None:
            raise CollectiveOrderError(problem)


def find_deadlock(by_rank: Sequence[Sequence[Collective]]) -> str | None:
    """Return where ranks wait for each other if each ends a collective before it begins the next; None = nowhere.

    by_rank: the collectives of each rank, in the order in which it issues them. The ranks of a
    group may issue more or fewer of them than those of another group, such as another copy of the
    target.
    """
    places = [0] * len(by_rank)

    def next_of(rank: int) -> Collective | None:
        return by_rank[rank][places[rank]] if places[rank] < len(by_rank[rank]) else None

    waiting = deque(range(len(by_rank)))
    while waiting:
        rank = waiting.popleft()
        collective = next_of(rank)
        if collective is None or any(next_of(other) != collective for other in collective.ranks):
            continue
        for other in collective.ranks:
            places[other] += 1
        waiting += collective.ranks
    for rank, issued in enumerate(by_rank):
        if places[rank] == len(issued):
            continue
        collective = issued[places[rank]]
        other = next(other for other in collective.ranks if next_of(other) != collective)
        instead = next_of(other) or "the end of the step"
        return (
            f"ranks issue collectives in different orders, which can deadlock on GPUs: rank {rank} would wait in {collective}, "
            f"and rank {other} in {instead}. Use overlap.placement=serial, and report this as a bug"
        )
    return None


class _Recorder(TorchDispatchMode):
    """Appends the name and group of every collective to a list."""

    is_off = False

    def __init__(self, issued: list[Collective]) -> None:
        super().__init__()
        self._issued = issued

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and not _Recorder.is_off:
            group = _group_of(args)
            ranks = tuple(distributed.get_process_group_ranks(group))
            name = function._overloadpacket.__name__.strip("_")
            self._issued.append(Collective(name, group.group_desc, ranks))
        return function(*args, **(kwargs or {}))


@contextmanager
def _not_recording() -> Iterator[None]:
    _Recorder.is_off = True
    try:
        yield
    finally:
        _Recorder.is_off = False


def _group_of(arguments: Any) -> distributed.ProcessGroup:
    """Return the process group among the arguments of a collective."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            try:
                return distributed.ProcessGroup.unbox(argument)
            except RuntimeError:  # another object, such as a reduction
                continue
    raise AssertionError("a collective without a process group")
