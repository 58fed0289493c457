"""Virtual time for a pipeline and its consumer, so that what they take does not depend on the machine."""

import heapq
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

HANG_S = 120.0  # of real time; it only ends a test whose threads all wait for each other


class VirtualTime:
    """A clock that moves on only while all threads sleep or wait, and then to the end of the next sleep.

    The threads are real: the one that creates the clock, and those that pipelines start from then on. Their code takes
    no time, and `sleep` takes exactly as long as it says. Measurements of CPU time by `TimeMark` read this clock.
    now_s: the time, in seconds since the clock was created.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self._lock = threading.Lock()
        self._num_running = 1
        self._num_sleeps = 0
        self._sleepers: list[tuple[float, int, threading.Event]] = []
        threads = SimpleNamespace(
            Condition=lambda: VirtualCondition(self),
            Thread=lambda **options: VirtualThread(self, **options),
            current_thread=threading.current_thread,
        )
        monkeypatch.setattr("engine.overlap.pipeline.threading", threads)
        monkeypatch.setattr("engine.overlap.thread_turns.threading", threads)
        monkeypatch.setattr("engine.host.pinned_copy.time", SimpleNamespace(perf_counter=lambda: self.now_s))

    def sleep(self, seconds: float) -> None:
        """Stands for `time.sleep`."""
        woken = threading.Event()
        with self._lock:
            heapq.heappush(self._sleepers, (self.now_s + seconds, self._num_sleeps, woken))
            self._num_sleeps += 1
        self.stop_running()
        self.wait_for(woken)

    def start_running(self) -> None:
        """Count a thread that begins, or that is about to be woken."""
        with self._lock:
            self._num_running += 1

    def stop_running(self) -> None:
        """Count a thread that sleeps, waits or ends; after the last one, the next sleeper wakes."""
        with self._lock:
            self._num_running -= 1
            if self._num_running == 0 and self._sleepers:
                self.now_s, _, woken = heapq.heappop(self._sleepers)
                self._num_running = 1
                woken.set()

    def wait_for(self, woken: threading.Event) -> None:
        """Wait until another thread wakes this one, which counts as running from then on."""
        assert woken.wait(HANG_S), "the threads wait for each other, or one of them computes without an end"


class VirtualCondition:
    """Stands for `threading.Condition`; a thread that waits in it lets the time go on."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self._lock = threading.Lock()
        self._waiting: list[threading.Event] = []

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: Any) -> None:
        self._lock.release()

    def wait_for(self, predicate: Callable[[], Any]) -> None:
        while not predicate():
            woken = threading.Event()
            self._waiting.append(woken)
            self._time.stop_running()
            self._lock.release()
            try:
                self._time.wait_for(woken)
            finally:
                self._lock.acquire()

    def notify_all(self) -> None:
        for woken in self._waiting:
            self._time.start_running()
            woken.set()
        self._waiting.clear()


class VirtualThread(threading.Thread):
    """A thread that counts as running until it sleeps, waits or ends."""

    def __init__(self, time: VirtualTime, **options: Any) -> None:
        super().__init__(**options)
        self._time = time

    def start(self) -> None:
        self._time.start_running()
        super().start()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._time.stop_running()

    def join(self, timeout: float | None = None) -> None:
        self._time.stop_running()
        super().join(timeout)
        self._time.start_running()
