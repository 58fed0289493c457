"""Asynchronous copies from the device to the host, and time measurement on the device."""

import time

import torch
from torch import Tensor


def to_pinned(values: Tensor) -> Tensor:
    """Return a copy in pinned memory, queued on the current stream without blocking the host."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


class HostCopy:
    """Asynchronous copy of a device tensor to the host; call `wait` to get the values.

    On a GPU the copy to pinned memory is queued on the current stream. On a CPU it is made
    immediately.
    """

    def __init__(self, values: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if not values.is_cuda:
            self._host = values.clone()
            return
        self._host = to_pinned(values)
        self._ready = torch.cuda.current_stream(values.device).record_event()

    def is_ready(self) -> bool:
        """Return whether `wait` would return immediately."""
        return self._ready is None or self._ready.query()

    def wait(self) -> Tensor:
        """Return the values on the host."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host


class TimeMark:
    """Timestamp in the device's work: in the current stream on a GPU, in the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def is_passed(self) -> bool:
        """Return whether the device has passed this mark; does not wait."""
        return self._event is None or self._event.query()

    def seconds_since(self, earlier: "TimeMark") -> float:
        """Return the seconds since an earlier mark; the device must have passed both."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time
