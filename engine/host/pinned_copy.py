"""Copies from the device to the host that the host does not wait for, and marks of time on the device."""

import time

import torch
from torch import Tensor


def to_pinned(values: Tensor) -> Tensor:
    """Return a copy in pinned memory, made in the order of the current stream; the host does not wait for it."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


class HostCopy:
    """A copy of a device tensor on the host; call `wait` for it.

    On a GPU the copy goes to pinned memory in the order of the current stream. On a CPU it is made at once.
    """

    def __init__(self, values: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if not values.is_cuda:
            self._host = values.clone()
            return
        self._host = to_pinned(values)
        self._ready = torch.cuda.current_stream(values.device).record_event()

    def is_ready(self) -> bool:
        """Return whether `wait` would return at once."""
        return self._ready is None or self._ready.query()

    def wait(self) -> Tensor:
        """Return the values on the host."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host


class TimeMark:
    """A point in the work of the device: of the current stream on a GPU, of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: "TimeMark") -> float:
        """Return the seconds between two marks, both of which the device has passed."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time
