"""Telemetry of the hardware that a rank runs on: a thread reads its GPU and its machine once per second."""

import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from engine.host.energy import CpuEnergy, EnergyMeter, PowerIntegral
from engine.host.memory_limit import read_memory_limit
from engine.host.nvml_gpu import CLOCK, MEMORY, NVLINK, PCIE, POWER, TEMPERATURE, UTILIZATION, Figures, GpuUnknownError, NvmlGpu

PERIOD_S = 1.0
FIRST_PERIOD_S = 0.2  # so that short runs have figures, too
SHORTEST_S = 0.1  # interval over which a rate is measured
SECONDS_TO_END = 2.0  # for the thread, which may be in a call of the driver
CPU = "cpu_utilization"  # of the machine, 0 to 1
OWN_CPUS = "own_cpus"  # processors that this process keeps busy
HOST_MEMORY = "host_memory_bytes"
HOST_MEMORY_SHARE = "host_memory_share"  # of the memory of the machine, or of the limit of the container or job, 0 to 1
SWAP = "swap_bytes_per_s"  # in and out
# Keys of `metrics.jsonl` for figures that have another unit, and hence another name, there.
METRIC_NAMES = {MEMORY: "gpu_memory_gib", PCIE: "pcie_gb_per_s", NVLINK: "nvlink_gb_per_s"}
JOULES = "joules_per_million_tokens"
THREAD = "hardware-sampler"


@dataclass(frozen=True)
class HardwareReading:
    """Figures of an interval; an unknown figure is missing.

    mean, maximum: over the samples of the interval, or the last sample before it if it has none.
    num_samples: of the GPU's clock. num_slowed: samples in which it was held back.
    slowdowns: samples by reason. max_clock_mhz: None = unknown.
    joules: that this rank accounts for, of its GPU or of its machine's processors; None = unknown.
    """

    mean: Mapping[str, float] = field(default_factory=dict)
    maximum: Mapping[str, float] = field(default_factory=dict)
    num_samples: int = 0
    num_slowed: int = 0
    slowdowns: Mapping[str, int] = field(default_factory=dict)
    max_clock_mhz: float | None = None
    joules: float | None = None

    def metrics(self) -> dict[str, float | None]:
        """Return the values for `metrics.jsonl`; None = unknown."""
        mean = self.mean.get
        largest = self.maximum.get
        return {
            "gpu_utilization": mean(UTILIZATION),
            "gpu_memory_gib": _scaled(largest(MEMORY), 2**30),
            "gpu_power_w": mean(POWER),
            "gpu_temperature_c": largest(TEMPERATURE),
            "gpu_clock_mhz": mean(CLOCK),
            "pcie_gb_per_s": _scaled(mean(PCIE), 1e9),
            "nvlink_gb_per_s": _scaled(mean(NVLINK), 1e9),
            "cpu_utilization": mean(CPU),
            "host_memory_gib": _scaled(largest(HOST_MEMORY), 2**30),
        }


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


class HostReader:
    """Reads the figures of the machine and of this process."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._counts_swap = _counts_swap()
        self._last = self._counters()

    def _counters(self) -> tuple[float, float, float, float, float]:
        """Return the time, the machine's total and idle CPU seconds, those of this process, and swapped bytes."""
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        # Linux counts the time of guests as user time, too.
        total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        own = self._process.cpu_times()
        swapped = 0
        if self._counts_swap:
            swap = psutil.swap_memory()
            swapped = swap.sin + swap.sout
        return time.monotonic(), total_s, idle_s, own.user + own.system, swapped

    def read(self) -> Figures:
        """Return the memory now, and the other figures since the last call. Raises OSError or psutil.Error."""
        used_bytes, total_bytes = _memory()
        figures: Figures = {HOST_MEMORY: used_bytes, HOST_MEMORY_SHARE: used_bytes / total_bytes}
        now = self._counters()
        seconds, total_s, idle_s, own_s, swapped = (new - old for new, old in zip(now, self._last, strict=True))
        if seconds < SHORTEST_S:
            return figures
        self._last = now
        figures[OWN_CPUS] = own_s / seconds
        if total_s > 0:
            figures[CPU] = min(1.0, max(0.0, 1 - idle_s / total_s))
        if self._counts_swap:
            figures[SWAP] = max(0.0, swapped) / seconds
        return figures


def _memory() -> tuple[int, int]:
    """Return used and total memory in bytes: of the container or job if it may use less than the machine has."""
    machine = psutil.virtual_memory()
    limit = read_memory_limit()
    if limit is not None and limit.limit_bytes < machine.total:
        return limit.used_bytes, limit.limit_bytes
    return machine.total - machine.available, machine.total


def _counts_swap() -> bool:
    """Return whether psutil can count what is swapped; otherwise it would warn at every reading."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            psutil.swap_memory()
        except (OSError, RuntimeWarning, psutil.Error):
            return False
    return True


class _Sums:
    """Sums over the samples of an interval."""

    def __init__(self) -> None:
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self._maximum: dict[str, float] = {}
        self._num_samples = 0
        self._num_slowed = 0
        self._slowdowns: Counter[str] = Counter()

    def add(self, figures: Figures, slowdowns: list[str] | None) -> None:
        for name, value in figures.items():
            self._totals[name] += value
            self._counts[name] += 1
            self._maximum[name] = max(value, self._maximum.get(name, value))
        if slowdowns is not None:
            self._num_samples += 1
            self._num_slowed += bool(slowdowns)
            self._slowdowns.update(slowdowns)

    def reading(self, latest: Figures, max_clock_mhz: float | None, joules: float | None) -> HardwareReading:
        """Return the figures of the interval. latest: of the last sample before it or in it."""
        mean = {name: total / self._counts[name] for name, total in self._totals.items()}
        return HardwareReading(
            mean=mean or latest,
            maximum=self._maximum or latest,
            num_samples=self._num_samples,
            num_slowed=self._num_slowed,
            slowdowns=self._slowdowns,
            max_clock_mhz=max_clock_mhz,
            joules=joules,
        )


class HardwareSampler:
    """Reads the hardware in a thread of its own, from `__enter__` to `__exit__`, and sums up the samples.

    It raises no error: a figure that cannot be read is unknown. Without any source of figures there is no thread.
    """

    def __init__(
        self,
        gpu: NvmlGpu | None = None,
        host: HostReader | None = None,
        cpu_energy: CpuEnergy | None = None,
        is_counted_elsewhere: bool = False,
    ) -> None:
        """Create it, and read once.

        gpu, host, cpu_energy: what is read. cpu_energy is that of a machine without GPUs.
        is_counted_elsewhere: whether another rank accounts for the energy that this one uses.
        """
        self._gpu = gpu
        self._host = host
        self._cpu_energy = cpu_energy
        self._is_counted_elsewhere = is_counted_elsewhere
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._meter = EnergyMeter()
        self._integral = PowerIntegral()
        self._has_counter = cpu_energy is not None or (gpu is not None and gpu.joules() is not None)
        self._sums = _Sums()
        self._latest: Figures = {}
        self._is_paused = False
        self._taken_j: float | None = 0.0  # None = the energy was unknown at the last call
        self._sample()

    @classmethod
    def open(cls, device: torch.device, local_rank: int, note: Callable[[str], None]) -> "HardwareSampler":
        """Return the sampler of a rank.

        local_rank: the machine's figures are read by its first rank, 0. note: is called with a
        line about what cannot be read.
        """
        is_first = local_rank == 0
        host = None
        if is_first:
            with suppress(OSError, psutil.Error):
                host = HostReader()
        if device.type != "cuda":
            return cls(None, host, CpuEnergy.find() if is_first else None, is_counted_elsewhere=not is_first)
        gpu = None
        try:
            gpu = NvmlGpu.open(_uuid_of(device))
        except GpuUnknownError as error:
            note(f"  no figures of the GPU: {error}")
        if gpu is not None and gpu.missing:
            missing = [METRIC_NAMES.get(name, name) for name in gpu.missing]
            if POWER in gpu.missing and gpu.joules() is None:
                missing.append(JOULES)
            note(f"  figures that this GPU or its driver does not give: {', '.join(missing)}")
        return cls(gpu, host)

    def __enter__(self) -> "HardwareSampler":
        if any(source is not None for source in (self._gpu, self._host, self._cpu_energy)):
            self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(SECONDS_TO_END)
            if self._thread.is_alive():  # in a call of the driver, which needs the library
                return
        if self._gpu is not None:
            self._gpu.close()

    def take(self) -> HardwareReading:
        """Return the figures since the last call, or since the beginning, and begin again. Reads nothing."""
        with self._lock:
            max_clock_mhz = None if self._gpu is None else self._gpu.max_clock_mhz
            reading = self._sums.reading(self._latest, max_clock_mhz, self._take_joules())
            self._sums = _Sums()
        return reading

    def take_joules(self) -> float | None:
        """Return only the joules since the last call of this function or of `take`; None = unknown."""
        with self._lock:
            return self._take_joules()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager around work whose figures and energy do not count."""
        with self._lock:
            self._is_paused = True
            before_j = self._joules()
        yield
        with self._lock:
            self._is_paused = False
            after_j = self._joules()
            if before_j is None or after_j is None or self._taken_j is None:
                self._taken_j = None
            else:
                self._taken_j += after_j - before_j

    def _joules(self) -> float | None:
        """Return the joules since the beginning; None = unknown."""
        return 0.0 if self._is_counted_elsewhere else self._meter.total(time.monotonic())

    def _take_joules(self) -> float | None:
        total_j = self._joules()
        before_j = self._taken_j
        self._taken_j = total_j
        if total_j is None or before_j is None:
            return None
        return total_j - before_j

    def _run(self) -> None:
        """Sample until the end; the body of the thread."""
        period_s = FIRST_PERIOD_S
        while not self._is_over.wait(period_s):
            self._sample()
            period_s = PERIOD_S

    def _sample(self) -> None:
        figures: Figures = {}
        slowdowns = None
        counter_j = None
        if self._host is not None:
            with suppress(OSError, psutil.Error):
                figures |= self._host.read()
        if self._gpu is not None:
            figures |= self._gpu.read()
            slowdowns = self._gpu.slowdowns()
            counter_j = self._gpu.joules()
        elif self._cpu_energy is not None:
            counter_j = self._cpu_energy.joules()
        now_s = time.monotonic()
        power_w = figures.get(POWER)
        with self._lock:
            if not self._has_counter:
                counter_j = self._integral.add(now_s, power_w)
            self._meter.add(now_s, counter_j, power_w)
            if self._is_paused:
                return
            self._latest = figures
            self._sums.add(figures, slowdowns)


def _uuid_of(device: torch.device) -> str:
    """Return the UUID of a GPU, which NVIDIA's library knows whichever GPUs this process can see.

    Raises GpuUnknownError.
    """
    try:
        return str(torch.cuda.get_device_properties(device).uuid)
    except (AttributeError, AssertionError, RuntimeError) as error:
        raise GpuUnknownError(f"PyTorch does not name its UUID: {error}") from error
