"""Named warnings of a run: what slows it down or endangers it, judged from its metrics and its hardware."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.config.sections import WARNINGS
from engine.host.files import write_text, writing
from engine.host.hardware import HOST_MEMORY_SHARE, OWN_CPUS, SWAP, HardwareReading
from engine.host.nvml_gpu import CLOCK, POWER_LIMIT
from engine.overlap.bottleneck import ADVICE, WAITS_FOR_DATA, WAITS_FOR_TARGET, find_bottleneck
from engine.overlap.step_clock import DATA, DRAFT_PARTS, PARTS, TARGET_FORWARD, WAIT
from engine.parallel.mesh import World
from engine.runtime.metrics import lines_until

WINDOW_S = 60.0  # seconds of training that are judged together
SECONDS_BETWEEN_JUDGEMENTS = 5.0  # of training
SLOW_CLOCK = 0.75  # share of the maximum, below which a power limit is worth a warning
THROTTLING = "throttling"
SWAPPING = "swapping"
LOADER_BOUND = "loader-bound"
TARGET_BOUND = "target-bound"
HOST_MEMORY = "host-memory"
FULL_MEMORY = 0.95  # share of the machine's memory
STEADY_SWAP = 1e6  # bytes/s


@dataclass(frozen=True)
class LoggedInterval:
    """Times and hardware figures of the steps between two logged ones.

    seconds: of training. step_s: of one step. parts_s: seconds of each of `PARTS` per step.
    placement: as in `Schedule.placement`.
    """

    seconds: float
    step_s: float
    parts_s: Mapping[str, float]
    reading: HardwareReading
    placement: str | None = None


def judge_clock(intervals: Sequence[LoggedInterval]) -> dict[str, str]:
    """Return the warning of a GPU whose clock was held back in most samples, by name; empty if there is none.

    Most busy GPUs are at their power limit. If nothing else holds the clock back in most samples, a
    warning needs a clock below `SLOW_CLOCK`.
    """
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
    is_slow = False
    max_clock_mhz = readings[-1].max_clock_mhz
    if clocks and max_clock_mhz is not None:
        clock_mhz = sum(clocks) / len(clocks)
        clock = f", at {clock_mhz:,.0f} of {max_clock_mhz:,.0f} MHz"
        is_slow = clock_mhz < SLOW_CLOCK * max_clock_mhz
    num_others = reasons.total() - reasons[POWER_LIMIT]
    if 2 * num_others <= num_samples and not is_slow:
        return {}
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
    placements = {interval.placement for interval in intervals}
    placement = placements.pop() if len(placements) == 1 else None
    cause = find_bottleneck(parts_s, step_s, reads_store, placement)
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


@dataclass
class Warned:
    """A warning of a rank. step: at which it was first true. count: how many times it was judged to be true."""

    step: int
    name: str
    rank: int
    count: int
    text: str


class RunWarnings:
    """Judges a run, prints each warning once, and counts it; `write` writes those of all ranks to `warnings.jsonl`.

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
        self._window_s = 0.0
        self._unjudged_s = 0.0
        self._is_first = True
        self._own: dict[str, Warned] = {}
        self._earlier: list[Warned] = []
        if world.is_main and self._path.exists():
            lines, _ = lines_until(self._path, first_step)
            self._earlier = [warned for warned in map(_warned, lines) if warned is not None]
            self._write_file(self._earlier)

    def add(self, step: int, interval: LoggedInterval) -> None:
        """Judge the run after a logged step."""
        found = judge_memory(interval)
        if self._is_first:  # its steps compile kernels and fill caches
            self._is_first = False
        else:
            found |= self._judge_window(interval)
        for name, text in found.items():
            if name in self._own:
                self._own[name].count += 1
                continue
            self._own[name] = Warned(step, name, self._world.rank, 1, text)
            place = "" if self._world.is_main else f"rank {self._world.rank}: "
            self._warn(f"  {place}{name}: {text}")

    def _judge_window(self, interval: LoggedInterval) -> dict[str, str]:
        """Return the warnings over the last `WINDOW_S` seconds, by name.

        Empty before so many have passed, and within `SECONDS_BETWEEN_JUDGEMENTS` of the last judgement.
        """
        window = self._window
        window.append(interval)
        self._window_s += interval.seconds
        self._unjudged_s += interval.seconds
        while self._window_s - window[0].seconds >= WINDOW_S:
            self._window_s -= window.popleft().seconds
        if self._window_s < WINDOW_S or self._unjudged_s < SECONDS_BETWEEN_JUDGEMENTS:
            return {}
        self._unjudged_s = 0.0
        found = judge_clock(window) | judge_swapping(window)
        if self._world.is_main:
            found |= judge_waiting(window, self._reads_store)
        return found

    def write(self) -> None:
        """Write the warnings of all ranks, on rank 0; a collective. A file that cannot be written stays as it was."""
        gathered = self._world.gather(list(self._own.values()))
        if not self._world.is_main:
            return
        merged = {(warned.name, warned.rank): warned for warned in self._earlier}
        for warned in (warned for own in gathered for warned in own):
            before = merged.get((warned.name, warned.rank))
            if before is not None:
                warned = replace(before, count=before.count + warned.count)
            merged[warned.name, warned.rank] = warned
        with suppress(OSError):  # they have been printed
            self._write_file(merged.values())

    def _write_file(self, warnings: Iterable[Warned]) -> None:
        """Write a line per warning, or remove the file if there is none. Raises WriteError."""
        ordered = sorted(warnings, key=lambda warned: (warned.step, warned.name, warned.rank))
        if ordered:
            write_text(self._path, "".join(f"{json.dumps(asdict(warned))}\n" for warned in ordered))
        else:
            with writing(self._path):
                self._path.unlink(missing_ok=True)


def _warned(line: bytes) -> Warned | None:
    """Return the warning in a line of the file, or None if the line holds something else."""
    try:
        facts = json.loads(line)
        return Warned(int(facts["step"]), str(facts["name"]), int(facts["rank"]), int(facts["count"]), str(facts["text"]))
    except (ValueError, TypeError, KeyError):
        return None
