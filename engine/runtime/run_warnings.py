"""Named warnings of a run: what slows it down or endangers it, judged from its metrics and its hardware."""

import json
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.host.files import write_whole
from engine.host.hardware import HOST_MEMORY_SHARE, OWN_CPUS, SWAP, HardwareReading
from engine.host.nvml_gpu import CLOCK
from engine.overlap.bottleneck import ADVICE, WAITS_FOR_DATA, WAITS_FOR_TARGET, find_bottleneck
from engine.overlap.step_clock import DATA, DRAFT_PARTS, PARTS, TARGET_FORWARD, WAIT
from engine.parallel.mesh import World
from engine.runtime.metrics import lines_until

WARNINGS = "warnings.jsonl"
WINDOW_S = 60.0  # seconds of training that are judged together
THROTTLING = "throttling"
SWAPPING = "swapping"
LOADER_BOUND = "loader-bound"
TARGET_BOUND = "target-bound"
HOST_MEMORY = "host-memory"
FULL_MEMORY = 0.95  # share of the machine's memory
STEADY_SWAP = 1e6  # bytes/s


@dataclass(frozen=True)
class LoggedInterval:
    """What a logged step knows of the steps since the last one.

    seconds: of training. step_s: of one step. parts_s: seconds of each of `PARTS` per step.
    """

    seconds: float
    step_s: float
    parts_s: Mapping[str, float]
    reading: HardwareReading


def judge_clock(intervals: Sequence[LoggedInterval]) -> dict[str, str]:
    """Return the warning of a GPU whose clock was held back in most samples, by name; empty if there is none."""
    readings = [interval.reading for interval in intervals]
    num_samples = sum(reading.num_samples for reading in readings)
    num_slowed = sum(reading.num_slowed for reading in readings)
    if 2 * num_slowed <= num_samples:
        return {}
    reasons: Counter[str] = Counter()
    for reading in readings:
        reasons.update(reading.slowdowns)
    why = ", ".join(name for name, _ in reasons.most_common())
    clocks = [reading.mean[CLOCK] for reading in readings if CLOCK in reading.mean]
    clock = ""
    if clocks and readings[-1].max_clock_mhz is not None:
        clock = f", at {sum(clocks) / len(clocks):,.0f} of {readings[-1].max_clock_mhz:,.0f} MHz"
    share = num_slowed / num_samples
    text = f"the GPU's clock was held back in {share:.0%} of the samples ({why}){clock}"
    return {THROTTLING: f"{text}; check its cooling and its power limit with nvidia-smi -q -d PERFORMANCE,POWER"}


def judge_swapping(intervals: Sequence[LoggedInterval]) -> dict[str, str]:
    """Return the warning of a machine that swaps in most intervals, by name; empty if there is none."""
    rates = [(interval.seconds, interval.reading.mean[SWAP]) for interval in intervals if SWAP in interval.reading.mean]
    total_s = sum(seconds for seconds, _ in rates)
    swapping_s = sum(seconds for seconds, rate in rates if rate > 0)
    swapped = sum(seconds * rate for seconds, rate in rates)
    if 2 * swapping_s <= total_s or swapped < STEADY_SWAP * total_s:
        return {}
    text = f"the machine swaps {swapped / total_s / 1e6:,.0f} MB/s, which slows every process on it"
    return {SWAPPING: f"{text}; end other processes, or use fewer ranks per machine or a smaller overlap.look_ahead"}


def judge_memory(interval: LoggedInterval) -> dict[str, str]:
    """Return the warning of a machine whose memory is almost full, by name; empty if there is none."""
    share = interval.reading.maximum.get(HOST_MEMORY_SHARE, 0.0)
    if share <= FULL_MEMORY:
        return {}
    limit = "the memory that this machine or job may use"
    text = f"{share:.0%} of {limit} is taken, and a process that needs more will be killed"
    return {HOST_MEMORY: f"{text}; end other processes, or use fewer ranks per machine or a smaller overlap.look_ahead"}


def judge_waiting(intervals: Sequence[LoggedInterval], reads_store: bool) -> dict[str, str]:
    """Return the warning of a draft that waits, by name; empty if it does not wait long.

    reads_store: whether hidden states are read from a store.
    """
    num_steps = sum(interval.seconds / interval.step_s for interval in intervals)
    step_s = sum(interval.seconds for interval in intervals) / num_steps
    parts_s = {}
    for part in PARTS:
        total_s = sum(interval.parts_s[part] * interval.seconds / interval.step_s for interval in intervals)
        parts_s[part] = total_s / num_steps
    cause = find_bottleneck(parts_s, step_s, reads_store)
    waited_s = parts_s[WAIT]
    if cause == WAITS_FOR_TARGET:
        return {TARGET_BOUND: f"the draft waits for {waited_s / step_s:.0%} of a step. {ADVICE[cause]}"}
    if cause != WAITS_FOR_DATA:
        return {}
    # Where nothing runs ahead, reading is not waited for but done in between.
    read_s = parts_s[DATA] + (parts_s[TARGET_FORWARD] if reads_store else 0.0)
    waited_s = max(waited_s, min(read_s, step_s - sum(parts_s[part] for part in DRAFT_PARTS)))
    if waited_s <= max(parts_s[part] for part in DRAFT_PARTS):
        return {}
    own_cpus = [interval.reading.mean[OWN_CPUS] for interval in intervals if OWN_CPUS in interval.reading.mean]
    busy = f", and this process keeps {sum(own_cpus) / len(own_cpus):.1f} processors busy" if own_cpus else ""
    text = f"waiting for data takes {waited_s / step_s:.0%} of a step, more than any other part{busy}"
    return {LOADER_BOUND: f"{text}. {ADVICE[cause]}"}


class RunWarnings:
    """Judges a run, prints each warning once, counts it, and writes it to `warnings.jsonl`.

    Every rank judges its own GPU, the first rank of a machine also the machine, and rank 0 the time of steps.
    """

    def __init__(
        self, output_dir: Path, world: World, first_step: int, warn: Callable[[str], None], reads_store: bool = False
    ) -> None:
        """Begin. On rank 0, keep only the earlier run's warnings up to step `first_step`. Raises WriteError.

        warn: prints a line. reads_store: whether hidden states are read from a store.
        """
        self._path = output_dir / WARNINGS
        self._world = world
        self._warn = warn
        self._reads_store = reads_store
        self._window: deque[LoggedInterval] = deque()
        self._is_first = True
        self._last_step = first_step
        self._counts: Counter[str] = Counter()
        self._texts: dict[str, str] = {}
        if world.is_main and self._path.exists():
            kept, _ = lines_until(self._path, first_step)
            if kept:
                write_whole(self._path, lambda place: place.write_bytes(b"".join(kept)))
            else:
                self._path.unlink()

    def add(self, step: int, interval: LoggedInterval) -> None:
        """Judge the run after a logged step."""
        self._last_step = step
        found = judge_memory(interval)
        if self._is_first:  # its steps compile kernels and fill caches
            self._is_first = False
        else:
            found |= self._judge_window(interval)
        for name, text in found.items():
            self._counts[name] += 1
            if self._counts[name] == 1:
                self._texts[name] = text
                place = "" if self._world.is_main else f"rank {self._world.rank}: "
                self._warn(f"  {place}{name}: {text}")
                self._append(step, name)

    def _judge_window(self, interval: LoggedInterval) -> dict[str, str]:
        """Return the warnings over the last `WINDOW_S` seconds, by name; empty before so many have passed."""
        window = self._window
        window.append(interval)
        total_s = sum(earlier.seconds for earlier in window)
        while total_s - window[0].seconds >= WINDOW_S:
            total_s -= window.popleft().seconds
        if total_s < WINDOW_S:
            return {}
        found = judge_clock(window) | judge_swapping(window)
        if self._world.is_main:
            found |= judge_waiting(window, self._reads_store)
        return found

    def close(self) -> None:
        """Write how often each warning was true, if more than once."""
        for name, count in self._counts.items():
            if count > 1:
                self._append(self._last_step, name)

    def _append(self, step: int, name: str) -> None:
        count = self._counts[name]
        line = {"step": step, "name": name, "rank": self._world.rank, "count": count, "text": self._texts[name]}
        # One write to a file that is opened to append: lines of different ranks do not mix.
        with suppress(OSError), self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")
