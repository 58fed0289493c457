"""Measure traffic and time of a sharded target's collectives, next to theory and to a single rank.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.bench_sharing --json sharing.json

Run from the repository's root, over gloo on CPUs and NCCL on GPUs. The shapes are those of
bench_target.py. Every rank has one micro-batch of a shape, with different tokens, and the target is
sharded in every way in which one copy spans all ranks.

The first table shows forwards, in ms: the slowest rank; the time that a rank spends in collectives,
including its wait for other ranks; and `alone`, a single rank with the tokens of all ranks. `rows`
is the number of rows that a rank sends to experts of other ranks: mean, maximum, and the number for
a balanced router.

The second table shows collectives: the bytes that a rank sends to other ranks per forward, as in a
ring for an all-reduce; the bytes of `TargetCost.traffic`, which omits traffic that does not grow
with the hidden size; and the bytes divided by the time spent.
"""

import argparse
import pickle
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

from benchmarks.bench_target import BENCHMARK, TargetShape, random_model
from benchmarks.harness import WARM_UP_CALLS, Place
from benchmarks.record import show, write_record
from engine.config.sections import divisors
from engine.parallel import experts
from engine.parallel.mesh import ALONE, Group, TargetMesh, World
from engine.parallel.zero import connect, disconnect
from engine.target.frozen import FrozenTarget
from launcher.command import join_environment

SHAPES = {"cpu": ("cpu-2k", "cpu-moe-2k"), "cuda": ("llama3.1-8b-8k", "qwen3-30b-a3b-8k")}
TIMEOUT_S = 600
START = "python -m torch.distributed.run --standalone --nproc_per_node {} -m benchmarks.bench_sharing"


def _others(group: Any) -> int:
    return distributed.get_world_size(group) - 1


def _gathered(_: Tensor, own: Tensor, group: Any, async_op: bool = False) -> int:
    return _others(group) * own.nbytes


def _scattered(own: Tensor, _: Tensor, group: Any, async_op: bool = False) -> int:
    return _others(group) * own.nbytes


def _reduced(values: Tensor, group: Any, op: Any = None) -> int:
    return 2 * _others(group) * values.nbytes // (_others(group) + 1)


def _exchanged(
    _: Tensor, rows: Tensor, received: Any = None, sent: Any = None, group: Any = None, async_op: bool = False
) -> int:
    sent = sent or [len(rows) // (_others(group) + 1)] * (_others(group) + 1)
    return (sum(sent) - sent[distributed.get_rank(group)]) * rows[:1].nbytes


def _objects(_: list, own: object, group: Any) -> int:
    return _others(group) * len(pickle.dumps(own))


# Function of torch.distributed -> its kind of collective, and a function for the bytes it sends.
KINDS: dict[str, tuple[str, Callable[..., int]]] = {
    "all_gather_into_tensor": ("all-gather", _gathered),
    "reduce_scatter_tensor": ("reduce-scatter", _scattered),
    "all_to_all_single": ("all-to-all", _exchanged),
    "all_reduce": ("all-reduce", _reduced),
    "all_gather_object": ("all-gather of objects", _objects),
}


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind in one forward of a rank: calls, bytes sent and seconds."""

    calls: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Timed:
    """Timed forwards of a rank.

    seconds: median time.
    sent: collectives of the last forward by kind, with the median of their times.
    num_rows: rows sent to experts of other ranks.
    """

    seconds: float
    sent: dict[str, Sent]
    num_rows: int


class Watch(ExitStack):
    """Context manager that records a rank's collectives, and the rows that it sends to experts."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        # Per call: bytes, and the moments before and after the call and before and after its wait.
        self._calls: dict[str, list[tuple[int, list]]] = {}
        # Per exchange: rows by receiving rank, and this rank's index.
        self._rows: list[tuple[Tensor, int]] = []

    def __enter__(self) -> "Watch":
        for name, (kind, num_bytes) in KINDS.items():
            watched = partial(self._note, getattr(distributed, name), kind, num_bytes)
            self.enter_context(mock.patch.object(distributed, name, watched))
        self.enter_context(mock.patch.object(experts, "exchange_counts", partial(self._note_rows, experts.exchange_counts)))
        return self

    def _note(self, inner: Callable, kind: str, num_bytes: Callable[..., int], *arguments: Any, **options: Any) -> Any:
        moments = [_moment(self._device)]
        result = inner(*arguments, **options)
        moments.append(_moment(self._device))
        self._calls.setdefault(kind, []).append((num_bytes(*arguments, **options), moments))
        return _Watched(result, moments, self._device) if options.get("async_op") else result

    def _note_rows(self, inner: Callable, counts_RP2: Tensor, group: Group) -> Tensor:
        """Record the rows of an exchange of counts, and run it.

        counts_RP2: rows and choices that each part of this rank's tokens sends to each rank.
        """
        self._rows.append((counts_RP2[..., 0].sum(1), group.rank))
        return inner(counts_RP2, group)

    @property
    def sent(self) -> dict[str, Sent]:
        return {
            kind: Sent(len(calls), sum(size for size, _ in calls), sum(_seconds_within(moments) for _, moments in calls))
            for kind, calls in self._calls.items()
        }

    @property
    def num_rows(self) -> int:
        """Number of rows sent to experts of other ranks, in all layers."""
        return sum(int(counts_R.sum() - counts_R[own]) for counts_R, own in self._rows)


@dataclass(frozen=True)
class _Watched:
    """Asynchronous collective that also records the time spent in its `wait`."""

    work: distributed.Work
    moments: list
    device: torch.device

    def wait(self) -> None:
        self.moments.append(_moment(self.device))
        self.work.wait()
        self.moments.append(_moment(self.device))


def _seconds_within(moments: Sequence[Any]) -> float:
    """Return the sum of several time spans. moments: start and end of each span, in order."""
    return sum(_seconds(before, after) for before, after in zip(moments[::2], moments[1::2], strict=True))


def _moment(device: torch.device) -> Any:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3


def meshes(num_ranks: int, has_experts: bool) -> list[tuple[int, int]]:
    """Return (tp_size, ep_size) of every mesh in which one copy of the target spans all ranks."""
    sizes = divisors(num_ranks)
    pairs = [(tp, ep) for tp in sizes for ep in sizes if max(tp, ep) == num_ranks]
    return [(tp, ep) for tp, ep in pairs if ep == 1 or has_experts]


def measure(world: World, shapes: dict[str, TargetShape], repeat: int) -> list[dict[str, Any]]:
    """Return one row of figures per shape and mesh, for JSON; a collective of all ranks."""
    rows = []
    for name, shape in shapes.items():
        own = replace(shape, seed=world.rank)
        everyone = replace(shape, num_tokens=world.size * shape.num_tokens)
        alone_s = torch.zeros((), dtype=torch.float64, device=world.device)
        if world.is_main:
            alone_s += _timed(everyone, World.alone(), ALONE, repeat).seconds
        world.send_from_main(alone_s)
        has_experts = bool(shape.cost(TargetMesh(ep=Group(world.size, world.rank))).plan.experts)
        for tp_size, ep_size in meshes(world.size, has_experts):
            mesh = TargetMesh.make(world, tp_size, ep_size)
            by_rank = [None] * world.size
            distributed.all_gather_object(by_rank, _timed(own, world, mesh, repeat))
            names = {"shape": name, "tp_size": tp_size, "ep_size": ep_size, "alone_ms": 1e3 * alone_s.item()}
            rows.append(names | _row(by_rank, own, mesh, world.device.type))
    return rows


def _timed(shape: TargetShape, world: World, mesh: TargetMesh, repeat: int) -> Timed:
    place = Place(world.device, torch.bfloat16 if world.device.type == "cuda" else torch.float32)
    target = FrozenTarget(random_model(shape.config, place), None, mesh=mesh)
    batch = shape.batch.to(place.device)
    slots_N = shape.slots_N.to(place.device)
    seconds = []
    watches = []
    for _ in range(WARM_UP_CALLS):
        target(batch, slots_N)
    for _ in range(repeat):
        world.barrier()
        with Watch(place.device) as watch:
            before = _moment(place.device)
            target(batch, slots_N)
            after = _moment(place.device)
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(_seconds(before, after))
        watches.append(watch.sent)
    sent = {
        kind: replace(last, seconds=statistics.median(watched[kind].seconds for watched in watches))
        for kind, last in watches[-1].items()
    }
    return Timed(statistics.median(seconds), sent, watch.num_rows)


def _row(by_rank: Sequence[Timed], shape: TargetShape, mesh: TargetMesh, device: str) -> dict[str, Any]:
    cost = shape.cost(mesh, device)
    theory = Counter()
    for name, num_bytes in cost.traffic(shape.forward).items():
        theory[name.partition(" ")[0]] += num_bytes
    # The traffic is halved because rows are sent there and back.
    even_rows = theory["all-to-all"] / 2 / (shape.config.hidden_size * cost.itemsize)
    collectives = []
    for kind, own in by_rank[0].sent.items():
        num_bytes = statistics.mean(of.sent[kind].num_bytes for of in by_rank)
        seconds = statistics.mean(of.sent[kind].seconds for of in by_rank)
        sent = {"collective": kind, "calls": own.calls, "bytes": num_bytes, "theory_bytes": theory[kind]}
        collectives.append(sent | {"ms": 1e3 * seconds, "gb_per_s": num_bytes / seconds / 1e9})
    rows = [of.num_rows for of in by_rank]
    return {
        "tokens_a_rank": shape.num_tokens,
        "ms": 1e3 * max(of.seconds for of in by_rank),
        "in_collectives_ms": sum(sent["ms"] for sent in collectives),
        "rows": statistics.mean(rows),
        "most_rows": max(rows),
        "even_rows": even_rows,
        "collectives": collectives,
    }


def _shown(rows: list[dict[str, Any]]) -> None:
    forwards = []
    collectives = []
    for row in rows:
        names = {"shape": row["shape"], "tp": str(row["tp_size"]), "ep": str(row["ep_size"])}
        times = {"ms": row["ms"], "in collectives": row["in_collectives_ms"], "alone": row["alone_ms"]}
        times["x alone"] = row["alone_ms"] / row["ms"]
        forwards.append(names | times | {"rows": row["rows"], "at most": row["most_rows"], "even": row["even_rows"]})
        for sent in row["collectives"]:
            megabytes = {"MB": sent["bytes"] / 1e6, "theory": sent["theory_bytes"] / 1e6}
            rate = {"ms": sent["ms"], "GB/s": sent["gb_per_s"]}
            collectives.append(names | {"collective": sent["collective"], "calls": str(sent["calls"])} | megabytes | rate)
    show(forwards, "{:,.2f}")
    show(collectives, "{:,.2f}")


def main() -> None:
    world = World(**join_environment())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(BENCHMARK.shapes)
    usual = SHAPES[world.device.type]
    parser.add_argument("--shapes", nargs="+", choices=known, default=usual, metavar="NAME", help=", ".join(known))
    parser.add_argument("--repeat", type=int, default=10, help="timed forwards; default: %(default)s")
    parser.add_argument("--json", type=Path, help="file to write the figures, machine, versions and commit to")
    options = parser.parse_args()
    if world.size == 1:
        parser.error(f"this benchmark needs several ranks; start it with: {START.format(2)}")
    connect(world, TIMEOUT_S, cpu_threads=0)
    rows = measure(world, {name: BENCHMARK.shapes[name] for name in options.shapes}, options.repeat)
    if world.is_main:
        _shown(rows)
        words = ["--shapes", *options.shapes, "--repeat", str(options.repeat)]
        write_record(options.json, " ".join([START.format(world.size), *words]), rows, world.device.type)
    disconnect()


if __name__ == "__main__":
    main()
