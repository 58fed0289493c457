"""Account of the time of every part of a training step, read from the device without waiting for it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from engine.host.pinned_copy import TimeMark

DATA = "data"
TARGET_FORWARD = "target_forward"
TRANSFER = "transfer"
WAIT = "wait_for_target"
DRAFT_FORWARD = "draft_forward"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
PARTS = (DATA, TARGET_FORWARD, TRANSFER, WAIT, DRAFT_FORWARD, BACKWARD, OPTIMIZER)
TARGET_PARTS = (DATA, TARGET_FORWARD, TRANSFER)
DRAFT_PARTS = (DRAFT_FORWARD, BACKWARD, OPTIMIZER)
HOST = torch.device("cpu")
MOST_PENDING = 512  # spans; beyond this number they are read, even if no log reads them
TraceEvent = dict[str, Any]  # of the Chrome trace format


@dataclass(frozen=True)
class _Span:
    """A part of a step between two marks in the device's work.

    batch: number of the batch; None = unknown.
    """

    part: str
    step: int
    batch: int | None
    began: TimeMark
    ended: TimeMark


class StepClock:
    """Times the parts of training steps on one rank.

    On a GPU the times are those of the device, taken with events on the stream that a part runs on.
    They are read after the device has passed them, so that no measurement makes the host wait.

    on_part: is called when a part begins, with its name, and when a part ends, with "".
    """

    def __init__(self, device: torch.device, trace_steps: tuple[int, int] | None = None) -> None:
        """Start the clock. trace_steps: first and last optimizer step of which spans are kept for a trace."""
        self._device = device
        self._trace_steps = trace_steps
        self._started = TimeMark(device)
        self._started_at_s = time.time()
        self._pending: deque[_Span] = deque()
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._traced: list[TraceEvent] = []
        self.step = 0
        self.on_part: Callable[[str], None] = lambda part: None

    def mark(self) -> TimeMark:
        """Return a mark at this place of the current stream, or of the process on a CPU."""
        return TimeMark(self._device)

    def add(self, part: str, began: TimeMark, batch: int | None = None) -> None:
        """Add the time since `began` to a part."""
        self._append(_Span(part, self.step, batch, began, self.mark()))

    def add_seconds(self, part: str, seconds: float) -> None:
        """Add time that another rank has measured to a part."""
        self._seconds[part] += seconds

    @contextmanager
    def span(self, part: str, batch: int | None = None) -> Iterator[None]:
        """Context manager that adds the time of its body to a part."""
        self.on_part(part)
        began = self.mark()
        yield
        self.add(part, began, batch)

    @contextmanager
    def host_span(self, part: str) -> Iterator[None]:
        """Context manager that adds the time of its body on the host to a part."""
        self.on_part(part)
        began = TimeMark(HOST)
        yield
        self._append(_Span(part, self.step, None, began, TimeMark(HOST)))

    def _append(self, span: _Span) -> None:
        self.on_part("")
        self._pending.append(span)
        if len(self._pending) > MOST_PENDING:
            self._read()

    def take_seconds(self) -> Mapping[str, float]:
        """Return the seconds of each part since the last call, as far as the device has passed them."""
        self._read()
        seconds = self._seconds
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return seconds

    def trace_events(self, rank: int) -> list[TraceEvent]:
        """Return the traced spans as events of the Chrome trace format; waits for the device.

        Timestamps are in microseconds since the epoch, so that the events of all ranks can be shown together.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._read()
        return [{**event, "pid": rank} for event in self._traced]

    def _read(self) -> None:
        """Read the spans that the device has passed, the oldest first on each lane."""
        with self._lock:
            for _ in range(len(self._pending)):
                span = self._pending.popleft()
                if span.ended.is_passed():
                    self._seconds[span.part] += span.ended.seconds_since(span.began)
                    self._trace(span)
                else:
                    self._pending.append(span)

    def _trace(self, span: _Span) -> None:
        if self._trace_steps is None or not self._trace_steps[0] <= span.step <= self._trace_steps[1]:
            return
        start_s = self._started_at_s + span.began.seconds_since(self._started)
        lane = "target" if span.part in TARGET_PARTS else "draft"
        self._traced.append(
            {
                "name": span.part,
                "ph": "X",
                "ts": start_s * 1e6,
                "dur": span.ended.seconds_since(span.began) * 1e6,
                "tid": lane,
                "args": {"step": span.step, "batch": span.batch},
            }
        )


def draft_seconds(seconds: Mapping[str, float]) -> float:
    """Return the time of the draft's step. seconds: time of each part."""
    return sum(seconds[part] for part in DRAFT_PARTS)


def split_ratio(seconds: Mapping[str, float]) -> str | None:
    """Return the ratio of ranks at which the two sides would take the same time on ranks of their own, or None.

    seconds: time of each part per step, with target and draft on the same ranks.
    """
    target_s = seconds[TARGET_FORWARD]
    draft_s = draft_seconds(seconds)
    if min(target_s, draft_s) <= 0:
        return None
    if draft_s >= target_s:
        return f"1 rank for the target to {draft_s / target_s:.1f} for the draft"
    return f"{target_s / draft_s:.1f} ranks for the target to 1 for the draft"


def efficiency(seconds: Mapping[str, float], step_s: float) -> float:
    """Return which share of the shorter side's time is hidden behind the longer side.

    1 = a step takes as long as its longer side, 0 = as long as both sides together. Below 0 a step
    takes longer than both sides, because it waits for something else.
    seconds: time of each part per step. step_s: time of a step.
    """
    target_s = seconds[TARGET_FORWARD]
    draft_s = draft_seconds(seconds)
    shorter_s = min(target_s, draft_s)
    return (target_s + draft_s - step_s) / shorter_s if shorter_s > 0 else 0.0
