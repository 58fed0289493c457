"""Check that every rank issues its collectives in one order; for debugging."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from engine.parallel.mesh import World

Result = TypeVar("Result")


class CollectiveOrderError(RuntimeError):
    """Ranks have issued collectives in different orders."""


class CollectiveOrder:
    """Records the collectives that this rank issues, and compares their order with that of other ranks.

    Collectives on different communicators can deadlock on GPUs if two ranks issue them in different
    orders. A collective is known by its name and the description of its process group, because
    ranks in different groups of one kind, such as two groups that share a target, are in the same
    place of the order.
    """

    def __init__(self) -> None:
        self.issued: list[str] = []

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
        """Compare what all ranks have recorded since the last call; a collective, which is not recorded.

        Raises CollectiveOrderError that names the first difference between two ranks.
        """
        issued = list(self.issued)
        self.issued.clear()
        with _not_recording():
            digests = world.gather(hashlib.sha256("\n".join(issued).encode()).hexdigest())
            if len(set(digests)) == 1:
                return
            everyone = world.gather(issued)
        raise CollectiveOrderError(_first_difference(everyone))


def _first_difference(by_rank: list[list[str]]) -> str:
    first = by_rank[0]
    for rank, other in enumerate(by_rank):
        if other == first:
            continue
        length = min(len(first), len(other))
        place = next((index for index in range(length) if first[index] != other[index]), length)
        issued = [names[place] if place < len(names) else "nothing more" for names in (first, other)]
        return (
            f"ranks issue collectives in different orders, which can deadlock on GPUs: collective {place + 1} of this step is "
            f"{issued[0]} on rank 0 and {issued[1]} on rank {rank}. Use overlap.placement=serial, and report this as a bug"
        )
    raise AssertionError("no rank differs")


class _Recorder(TorchDispatchMode):
    """Appends the name and group of every collective to a list."""

    is_off = False

    def __init__(self, issued: list[str]) -> None:
        super().__init__()
        self._issued = issued

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and not _Recorder.is_off:
            self._issued.append(f"{function._overloadpacket.__name__.strip('_')} of {_group_of(args)}")
        return function(*args, **(kwargs or {}))


@contextmanager
def _not_recording() -> Iterator[None]:
    _Recorder.is_off = True
    try:
        yield
    finally:
        _Recorder.is_off = False


def _group_of(arguments: Any) -> str:
    """Return the description of the process group among the arguments of a collective."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            try:
                return distributed.ProcessGroup.unbox(argument).group_desc
            except RuntimeError:  # another object, such as a reduction
                continue
    return "an unknown group"
