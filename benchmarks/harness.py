"""Measure time and memory of a benchmark's providers, and compare them with the computed floor.

A benchmark is data: shapes, providers, and one `setup` that turns a provider and a shape's tensors
into a call. The call does the work and keeps no state. All providers of a shape are set up and
warmed up, then timed alternately, A B A B ..., so that other load on the machine affects all of
them alike.

- Time: measured between CUDA events, with the L2 cache overwritten first; wall-clock time on a CPU.
- Peak memory: increase during one additional call. On a GPU, this is the memory that PyTorch
  allocates. On a CPU, it is the resident memory of this process: freed pages are returned to the
  kernel (`malloc_trim`), then the kernel's high-water mark is reset (`/proc/self/clear_refs`) and
  read after the call. It is unknown if the kernel has no such mark.
- Floor: time for the work's FLOPs and bytes (engine/models/costs.py) at the rates of the
  datasheet. Without a datasheet, at the best rates of large products and copies. These are measured
  before the run and after each shape, because other load can slow the machine down temporarily.
- MFU: share of the peak FLOP/s that the floor uses. `of product`: share of the FLOP/s that the best
  large product reached on this machine.
"""

import argparse
import contextlib
import ctypes
import fnmatch
import gc
import json
import re
import resource
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.record import machine_and_versions
from engine.host.freed_memory import keep_freed_memory
from engine.kernels import Kernels
from engine.kernels.matmul import product
from engine.kernels.self_check import SelfCheck
from engine.models.costs import HardwarePeak, StepPart, floor_s, peak_of
from engine.parallel.mesh import World

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP_CALLS = 2
L2_BYTES = 256 << 20
TABLE_WIDTH = 140
COPIED_BYTES = 256 << 20
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Place:
    """Device and precision of the work."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    load: returns the first argument of `setup`; it may import optional packages.
    devices: types of device on which the provider runs.
    """

    load: Callable[[], Any]
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Benchmark:
    """Definition of a benchmark.

    module: name of the module after `python -m`.
    shapes: shapes by name.
    default_shapes: patterns of the shapes that run by default, by device type.
    providers: providers by name.
    prepare: (shape, place) -> tensors that the providers share.
    setup: (what a provider loads, these tensors) -> a call that does the work.
    parts: shape -> the work that no provider can avoid, by name.
    figures: (shape, seconds) -> further columns.
    """

    module: str
    shapes: dict[str, Any]
    default_shapes: dict[str, tuple[str, ...]]
    providers: dict[str, Provider]
    prepare: Callable[[Any, Place], Any]
    setup: Callable[[Any, Any], Callable[[], object]]
    parts: Callable[[Any], dict[str, StepPart]]
    figures: Callable[[Any, float], dict[str, float]]


@dataclass
class Row:
    """Results of a provider at a shape.

    seconds: time of every timed call. peak_bytes: peak memory of one call; None if unknown.
    error: reason why there are no results.
    kernels: the most expensive kernels of one additional call, with `--profile`.
    """

    shape: str
    provider: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def record(self, benchmark: Benchmark, place: Place, peak: HardwarePeak, tried: HardwarePeak) -> dict[str, Any]:
        """Return the row as written to JSON.

        peak: rates that the floor uses. tried: rates that were measured on this machine.
        """
        names = {"shape": self.shape, "provider": self.provider}
        if self.error is not None:
            return names | {"error": self.error}
        shape = benchmark.shapes[self.shape]
        median_s = statistics.median(self.seconds)
        parts = benchmark.parts(shape)
        num_flops = sum(part.flops for part in parts.values())
        least_s = floor_s(parts, peak, place.dtype)
        milliseconds = {"median": median_s, "min": min(self.seconds), "max": max(self.seconds), "floor": least_s}
        return (
            names
            | {f"{name}_ms": 1e3 * value for name, value in milliseconds.items()}
            | {"over_floor": median_s / least_s, "mfu": num_flops / median_s / peak.flops_per_s[place.dtype]}
            | {"of_product": num_flops / median_s / tried.flops_per_s[place.dtype]}
            | {"flops": num_flops, "peak_bytes": self.peak_bytes}
            | ({"kernels": self.kernels} if self.kernels else {})
            | benchmark.figures(shape, median_s)
        )


def choose_tiles(kernels: Kernels, place: Place, head_dim: int) -> None:
    """Choose the kernels' tile sizes by timing, as a run does on a GPU; nothing on a CPU."""
    if place.device.type == "cuda":
        SelfCheck.of(World.alone(place.device), None, print).choose_tiles(kernels, place.dtype, head_dim)


def main(benchmark: Benchmark) -> None:
    """Run the command line of a benchmark."""
    options = _parse(benchmark)
    place = Place(torch.device(options.device), DTYPES[options.dtype])
    if options.device == "cpu":
        keep_freed_memory()
        _refuse_more_memory_than_there_is()
    chosen = options.shapes, options.providers
    for figures in measured(benchmark, *chosen, place, options.repeat, options.profile):
        # The file is written after every shape, so an interrupted run keeps its results.
        if options.json is not None:
            record = _describe(benchmark, options, place) | figures
            options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console = Console(width=max(Console().width, TABLE_WIDTH))
    console.print(f"{options.device}, {options.dtype}; floor by {figures['peak']['source']}", highlight=False)
    console.print(_table(figures["rows"]))


def measured(
    benchmark: Benchmark,
    shapes: Sequence[str],
    providers: Sequence[str],
    place: Place,
    repeat: int,
    profile: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield after every shape the rows so far and the rates of their floor, as written to JSON.

    profile: number of the most expensive kernels to record per provider.
    """
    progress = Console(stderr=True)
    rows = []
    tried = _tried(place)
    for name in shapes:
        progress.print(f"{name}: {', '.join(providers)}", style="dim", highlight=False)
        rows += _measure(benchmark, name, providers, place, repeat, profile)
        gc.collect()
        tried = _faster(tried, _tried(place))
        peak = _peak(place, tried)
        rates = {"source": peak.name, "flops_per_s": peak.flops_per_s[place.dtype], "bytes_per_s": peak.bytes_per_s}
        rates["product_flops_per_s"] = tried.flops_per_s[place.dtype]
        yield {"peak": rates, "rows": [row.record(benchmark, place, peak, tried) for row in rows]}


def _measure(
    benchmark: Benchmark,
    shape_name: str,
    providers: Sequence[str],
    place: Place,
    repeat: int,
    profile: int,
) -> list[Row]:
    """Measure every provider at one shape. A provider that fails is not run again."""
    rows = {name: Row(shape_name, name) for name in providers}
    calls = {}
    with _caught(*rows.values()):
        cache = torch.empty(L2_BYTES, dtype=torch.uint8, device=place.device) if place.device.type == "cuda" else None
        prepared = benchmark.prepare(benchmark.shapes[shape_name], place)
    for name, row in rows.items():
        if row.error is None:
            with _caught(row):
                calls[name] = benchmark.setup(benchmark.providers[name].load(), prepared)
                for _ in range(WARM_UP_CALLS):
                    calls[name]()
                row.peak_bytes = _peak_bytes(calls[name], place)
            gc.collect()  # A provider that failed may have left garbage.
    for _ in range(repeat):
        for name, row in rows.items():
            if row.error is None:
                with _caught(row):
                    row.seconds.append(_seconds(calls[name], cache))
    for name, row in rows.items():
        if row.error is None and profile > 0:
            with _caught(row):
                row.kernels = _kernels(calls[name], place, profile)
    return list(rows.values())


def _kernels(call: Callable[[], object], place: Place, count: int) -> list[dict[str, Any]]:
    """Return the most expensive kernels of one call.

    Each has its name, total milliseconds, share of all kernels' time, and number of calls.
    On a CPU these are PyTorch's operators, by the time spent in themselves.
    """
    on_gpu = place.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    microseconds = {}
    calls = {}
    for event in profiler.key_averages():
        microseconds[event.key] = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        calls[event.key] = event.count
    total = sum(microseconds.values()) or 1
    most = sorted(microseconds, key=microseconds.get, reverse=True)[:count]
    return [
        {"name": name, "ms": microseconds[name] / 1e3, "share": microseconds[name] / total, "calls": calls[name]}
        for name in most
    ]


@contextlib.contextmanager
def _caught(*rows: Row) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        for row in rows:
            row.error = _reason(error)


def _reason(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    kind = "not here" if isinstance(error, ImportError) else type(error).__name__
    return f"{kind}: {first_line}".replace(str(ROOT), ".")


def _seconds(call: Callable[[], object], cache: torch.Tensor | None) -> float:
    """Return the seconds of one call.

    cache: on a GPU, a tensor larger than the L2 cache; None on a CPU. Overwriting it also keeps the
    GPU busy while the first kernels are launched.
    """
    if cache is None:
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    cache.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_bytes(call: Callable[[], object], place: Place) -> int | None:
    gc.collect()
    if place.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        call()
        return None
    before = _kernel_bytes("VmRSS")
    call()
    return max(0, _kernel_bytes("VmHWM") - before)


def _kernel_bytes(name: str, path: str = "/proc/self/status") -> int:
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(encoding="ascii"), re.MULTILINE)[1])


def _refuse_more_memory_than_there_is() -> None:
    """Limit this process to the available memory, so that a larger allocation raises an error.

    Without the limit, the kernel would kill the process later.
    """
    with contextlib.suppress(OSError, TypeError, ValueError):
        limit = _kernel_bytes("VmData") + _kernel_bytes("MemAvailable", "/proc/meminfo")
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _peak(place: Place, tried: HardwarePeak) -> HardwarePeak:
    """Return the rates of the datasheet, or those measured here if there is no datasheet."""
    try:
        return peak_of(place.device)
    except ValueError:
        return tried


def _tried(place: Place) -> HardwarePeak:
    """Return the best rates of a few large products and copies."""
    size = PRODUCT_SIZE[place.device.type]
    a, b = (torch.randn(size, size, device=place.device, dtype=place.dtype) for _ in range(2))
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=place.device)
    target = torch.zeros_like(source)
    cache = torch.empty(1, device=place.device) if place.device.type == "cuda" else None
    products_s = []
    copies_s = []
    for _ in range(5):
        products_s += [_seconds(lambda: product(a, b), cache), _seconds(lambda: a @ b, cache)]
        copies_s.append(_seconds(lambda: target.copy_(source), cache))
    rate = 2 * size**3 / min(products_s)
    return HardwarePeak("rates measured here", {place.dtype: rate}, 2 * COPIED_BYTES / min(copies_s))


def _faster(one: HardwarePeak, other: HardwarePeak) -> HardwarePeak:
    rates = {dtype: max(rate, other.flops_per_s[dtype]) for dtype, rate in one.flops_per_s.items()}
    return HardwarePeak(one.name, rates, max(one.bytes_per_s, other.bytes_per_s))


def _describe(benchmark: Benchmark, options: argparse.Namespace, place: Place) -> dict[str, Any]:
    """Return the machine, versions, commit and command, without any local paths."""
    chosen = {"device": [options.device], "dtype": [options.dtype], "shapes": options.shapes, "providers": options.providers}
    words = [word for name, values in chosen.items() for word in (f"--{name}", *values)]
    if options.profile:
        words += ["--profile", str(options.profile)]
    command = shlex.join(["python", "-m", benchmark.module, *words, "--repeat", str(options.repeat)])
    return {"command": command} | machine_and_versions(place.device)


_COLUMNS = {
    "median_ms": ("median ms", "{:.4g}"),
    "min_ms": ("min", "{:.4g}"),
    "max_ms": ("max", "{:.4g}"),
    "floor_ms": ("floor ms", "{:.3g}"),
    "over_floor": ("x floor", "{:.2f}"),
    "mfu": ("MFU", "{:.1%}"),
    "of_product": ("of product", "{:.1%}"),
}


# These are shown elsewhere or omitted.
_NOT_COLUMNS = ("shape", "provider", "error", "flops", "peak_bytes", "kernels")


def _table(rows: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    figures = [name for name in names if name not in (*_NOT_COLUMNS, *_COLUMNS)]
    titles = [title for title, _ in _COLUMNS.values()]
    table = Table("shape", "provider", *titles, "peak MiB", *figures, box=SIMPLE)
    for column in table.columns[2:]:
        column.justify = "right"
    if "error" in names:
        table.add_column("error")
    for row in rows:
        if "error" in row:
            table.add_row(row["shape"], row["provider"], *[""] * (len(table.columns) - 3), row["error"])
            continue
        peak_bytes = "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        measured = [text.format(row[name]) for name, (_, text) in _COLUMNS.items()]
        table.add_row(row["shape"], row["provider"], *measured, peak_bytes, *(f"{row[name]:,.4g}" for name in figures))
    return table


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def _parse(benchmark: Benchmark) -> argparse.Namespace:
    parser = _Parser(prog=f"python -m {benchmark.module}", allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help="names or patterns ('*-kl') of:\n" + "\n".join(benchmark.shapes)
    )
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="names of: " + ", ".join(benchmark.providers))
    parser.add_argument("--repeat", type=int, default=10, help="timed calls of each provider; default: %(default)s")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="also record each provider's N most expensive kernels"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write rows, machine, versions and commit to")
    options = parser.parse_args()
    if options.device == "cuda" and not on_gpu:
        parser.error("--device cuda: PyTorch sees no GPU here; use cpu")
    if options.profile < 0:
        parser.error(f"--profile {options.profile}: expected at least 0")
    if options.repeat < 1:
        parser.error(f"--repeat {options.repeat}: expected at least 1")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: its folder does not exist; create it first")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    fitting = [name for name, provider in benchmark.providers.items() if options.device in provider.devices]
    try:
        options.shapes = _chosen("shapes", options.shapes or benchmark.default_shapes[options.device], list(benchmark.shapes))
        options.providers = _chosen("providers", options.providers or fitting, fitting, f" on {options.device}")
    except ValueError as error:
        parser.error(str(error))
    return options


def _chosen(option: str, patterns: list[str] | tuple[str, ...], valid: list[str], where: str = "") -> list[str]:
    """Return the valid names that match the patterns, in order.

    Raises ValueError for a pattern that matches no name.
    """
    names = {pattern: fnmatch.filter(valid, pattern) for pattern in patterns}
    for pattern, matching in names.items():
        if not matching:
            raise ValueError(f"--{option} {pattern}: no such name{where}; use {', '.join(valid)}")
    return list(dict.fromkeys(name for matching in names.values() for name in matching))
