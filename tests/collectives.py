"""Count the collectives that a rank really issues, whichever function asked for them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Issued:
    """Collectives in order, as (phase, operation, bytes of the whole), and how often each phase began."""

    calls: list[tuple[str, str, int]] = field(default_factory=list)
    begun: Counter[str] = field(default_factory=Counter)

    def num_bytes(self, phase: str, operation: str) -> int:
        return sum(size for where, name, size in self.calls if where == phase and operation in name)


class CountCollectives(TorchDispatchMode):
    """While active, notes every operation of torch's process groups."""

    def __init__(self) -> None:
        super().__init__()
        self.issued = Issued()
        self._phase = "between"

    def watch(self, phase: str, owner: object, method: str) -> None:
        """From now on, what `owner.method` issues belongs to this phase."""
        inner: Callable[..., Any] = getattr(type(owner), method).__get__(owner)

        def watched(*arguments: Any) -> Any:
            self._phase = phase
            self.issued.begun[phase] += 1
            result = inner(*arguments)
            self._phase = "between"
            return result

        setattr(owner, method, watched)

    def count(self, name: str, owner: object, method: str) -> None:
        """From now on, count how often `owner.method` is called; what it issues belongs to the phase around it."""
        inner: Callable[..., Any] = getattr(type(owner), method).__get__(owner)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.issued.begun[name] += 1
            return inner(*arguments, **options)

        setattr(owner, method, counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            # a gather's output and a scatter's input are whole; the other argument is this rank's part
            size = max(_num_bytes(argument) for argument in args[:2])
            self.issued.calls.append((self._phase, function.overloadpacket.__name__, size))
        return function(*args, **(kwargs or {}))


def _num_bytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(_num_bytes(item) for item in value)
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
