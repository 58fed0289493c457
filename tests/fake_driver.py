"""Stand-ins for a CUDA driver, and for libraries that compute on a GPU alone."""

import collections
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from engine.kernels import flash
from engine.kernels.flash import FlashAttention, FlashInputs
from tests.device_tensors import MixedDevices, OnDevice, values_of
from tests.kernels.plain_flash import PLAIN


class Notes(Protocol):
    """Where launches and waits are noted."""

    launches: collections.Counter[str]

    def wait(self, kind: str) -> None: ...


class FakeEvent:
    """Work that is already done, since the fake device has finished whatever was launched."""

    def __init__(self, wait: Callable[[str], None]) -> None:
        """wait: notes what the host waits for."""
        self._wait = wait
        self._recorded_s = 0.0

    def record(self, stream: object = None) -> None:
        self._recorded_s = time.perf_counter()

    def elapsed_time(self, end: "FakeEvent") -> float:
        """Milliseconds of the host from this event to `end`."""
        return 1e3 * (end._recorded_s - self._recorded_s)

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._wait("event")


class FakeStream:
    """The only stream."""

    def __init__(self, wait: Callable[[str], None]) -> None:
        """wait: notes what the host waits for."""
        self._wait = wait

    def wait_event(self, event: FakeEvent) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self._wait)
        event.record()
        return event

    def synchronize(self) -> None:
        self._wait("stream")


def driver_patches(fake: Notes) -> list:
    """What stands in for the driver, and for libraries that have no CPU version."""

    @contextmanager
    def on_stream(stream: object) -> Iterator[None]:
        yield

    stream = FakeStream(fake.wait)
    driver = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "a device that is not there",
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: fake.wait("device"),
        "current_stream": lambda device=None: stream,
        "Stream": lambda *_, **__: stream,
        "Event": lambda *_, **__: FakeEvent(fake.wait),
        "stream": on_stream,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (1 << 40, 1 << 40),
    }
    patches = [mock.patch.object(torch.cuda, name, value) for name, value in driver.items()]
    patches.append(mock.patch.object(flash, "available_flash", lambda: _flash_attention(fake, PLAIN)))
    patches.append(mock.patch.object(torch.Tensor, "record_stream", lambda x, stream: None))
    return patches + _triton_patches(fake)


def _flash_attention(fake: Notes, plain: FlashAttention) -> FlashAttention:
    """Flash attention that computes as `plain` does, and counts as one launch."""

    def launched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def launch(inputs: FlashInputs, *others: torch.Tensor) -> Any:
            leaves = [leaf for leaf in (*inputs, *others) if isinstance(leaf, torch.Tensor)]
            if not all(isinstance(leaf, OnDevice) for leaf in leaves):
                raise MixedDevices(f"{name} reads tensors of the host")
            fake.launches[name] += 1
            on_host = tree_map_only(torch.Tensor, values_of, (inputs, *others))
            with torch._C.DisableTorchFunction():
                outputs = function(*on_host)
            return tuple(OnDevice.holding(output) for output in outputs)

        return launch

    forward = launched("flash attention", plain.forward)
    return replace(plain, forward=forward, backward=launched("flash attention, backward", plain.backward))


def _triton_patches(fake: Notes) -> list:
    """Triton's interpreter computes a kernel from the values of its tensors, which must all be on the device."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return []
    interpret = GridExecutor.__call__

    def launch(self, *args, **kwargs) -> None:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(leaf, OnDevice) for leaf in leaves):
            name = self.fn.__name__
            if not all(isinstance(leaf, OnDevice) for leaf in leaves):
                raise MixedDevices(f"kernel {name} reads tensors of the host")
            fake.launches[name] += 1
        args, kwargs = tree_map_only(torch.Tensor, values_of, (args, kwargs))
        with torch._C.DisableTorchFunction():
            interpret(self, *args, **kwargs)

    return [mock.patch.object(GridExecutor, "__call__", launch)]
