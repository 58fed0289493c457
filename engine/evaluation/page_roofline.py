"""Section of a run's report: the measured time of each part of a step next to the least time on its device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.config.sections import COLOCATED
from engine.evaluation.charts import Roof, RoofPoint, number, roofline_chart, with_prefix
from engine.evaluation.page_parts import PART_NAMES, escaped, of_run, seconds_text, table
from engine.evaluation.run_record import RunRecord
from engine.models.costs import PEAKS, HardwarePeak
from engine.overlap.step_clock import DRAFT_PARTS, OPTIMIZER, TARGET_FORWARD

COUNTED_PARTS = (TARGET_FORWARD, *DRAFT_PARTS)
NEAR = 2.0  # a part that takes less than this many times its least time is near the limit of its device
LARGER = "train_micro_batch_size_per_gpu, data.max_tokens"
UNKNOWN = "-"
OVERLAPPED = (
    "Target and draft run at the same time on this device, so the measured time of a part includes time in which the other "
    "side slows it down: compare the step with its least time, not the parts."
)


@dataclass(frozen=True)
class Piece:
    """Work of one rank per optimizer step, as in `engine.runtime.step_work`, on a device.

    peak_flops, bytes_per_s: of the device; None = unknown.
    """

    part: str
    name: str
    flops: float
    bytes: float
    dtype: str
    peak_flops: float | None
    bytes_per_s: float | None

    @classmethod
    def of(cls, facts: Mapping[str, Any], peak: HardwarePeak | None) -> "Piece":
        dtype = str(facts["dtype"])
        return cls(
            part=str(facts["part"]),
            name=str(facts["name"]),
            flops=float(facts["flops"]),
            bytes=float(facts["bytes"]),
            dtype=dtype,
            peak_flops=_peak_flops(peak, dtype),
            bytes_per_s=None if peak is None else peak.bytes_per_s,
        )

    @property
    def compute_s(self) -> float | None:
        return None if self.peak_flops is None else self.flops / self.peak_flops

    @property
    def traffic_s(self) -> float | None:
        return None if self.bytes_per_s is None else self.bytes / self.bytes_per_s

    @property
    def floor_s(self) -> float | None:
        """Least time in seconds, or None if the device's peak is unknown."""
        if self.compute_s is None or self.traffic_s is None:
            return None
        return max(self.compute_s, self.traffic_s)


def _peak_flops(peak: HardwarePeak | None, dtype: str) -> float | None:
    """Return the peak rate for products in a dtype, given its name; None = unknown."""
    return None if peak is None else peak.flops_per_s.get(getattr(torch, dtype, torch.bool))


@dataclass(frozen=True)
class Part:
    """Pieces of work that were measured together. measured_s: seconds per step; None = not measured."""

    key: str
    pieces: tuple[Piece, ...]
    measured_s: float | None

    @property
    def name(self) -> str:
        return PART_NAMES.get(self.key, self.key)

    @property
    def flops(self) -> float:
        return sum(piece.flops for piece in self.pieces)

    @property
    def bytes(self) -> float:
        return sum(piece.bytes for piece in self.pieces)

    @property
    def floor_s(self) -> float | None:
        floors = [piece.floor_s for piece in self.pieces]
        known = [floor for floor in floors if floor is not None]
        return sum(known) if len(known) == len(floors) else None

    @property
    def bound(self) -> str:
        """Whether compute or memory takes most of the least time."""
        if self.floor_s is None:
            return UNKNOWN
        by_compute = sum(piece.floor_s or 0.0 for piece in self.pieces if piece.floor_s == piece.compute_s)
        return "compute" if 2 * by_compute >= self.floor_s else "memory"

    @property
    def cells(self) -> tuple[str, ...]:
        measured = self.measured_s
        floor = self.floor_s
        ratio = f"{measured / floor:.2f}" if measured and floor else UNKNOWN
        achieved = with_prefix(self.flops / measured, "FLOP/s") if measured and self.flops else UNKNOWN
        return (
            self.name,
            with_prefix(self.flops, "FLOP") if self.flops else UNKNOWN,
            with_prefix(self.bytes, "B"),
            number(self.flops / self.bytes) if self.flops and self.bytes else UNKNOWN,
            seconds_text(measured) if measured else UNKNOWN,
            achieved,
            seconds_text(floor) if floor is not None else UNKNOWN,
            ratio,
            self.bound,
        )


HEADINGS = ("part", "FLOPs", "memory traffic", "FLOP/byte", "measured", "achieved", "least time", "ratio", "bound by")
PIECE_HEADINGS = ("part", "piece", "FLOPs", "memory traffic", "FLOP/byte", "least time", "bound by")
NUM_MEASURED = 6  # headings of what is known without the device's peak


def roofline_section(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return the section, or "" if the work was not counted. Raises an error for facts that are none."""
    work = run.work
    if work is None or not run.metrics:
        return ""
    peak = PEAKS.get(str(work["device"]))
    parts = measured_parts(work, run.mean_parts(), peak)
    sentences = [_what_was_counted(work, peak)]
    step_s = run.mean("step_s")
    floor_s = step_floor_s(work, parts)
    if step_s and floor_s is not None:
        ratio = f"{step_s / floor_s:.2f} times"
        sentences.append(f"A step takes {seconds_text(step_s)}, {ratio} its least time of {seconds_text(floor_s)}.")
    advice = OVERLAPPED if run.placement == COLOCATED else largest_gap(parts)
    sentences += [advice] if advice is not None else []
    text = "".join(f"<p>{escaped(sentence)}</p>" for sentence in sentences)
    shown = len(HEADINGS) if peak is not None else NUM_MEASURED
    return (
        f"<h2>Measured and least time of a step{of_run(run, runs)}</h2>{text}"
        f"{table(HEADINGS[:shown], [part.cells[:shown] for part in parts])}{_chart(parts)}{_details(parts)}"
    )


def measured_parts(work: Mapping[str, Any], parts_s: Mapping[str, float], peak: HardwarePeak | None) -> list[Part]:
    """Return the parts of a step with their work, in the order of `COUNTED_PARTS`."""
    pieces = [Piece.of(facts, peak) for facts in work["pieces"]]
    parts = []
    for key in COUNTED_PARTS:
        own = [piece for piece in pieces if piece.part == key]
        if own:
            parts.append(Part(key, tuple(own), parts_s.get(key)))
    return parts


def step_floor_s(work: Mapping[str, Any], parts: Sequence[Part]) -> float | None:
    """Return the least time of a step: of both sides in turn, or of the longer side if each has devices of its own."""
    floors = {part.key: part.floor_s for part in parts}
    target_s = floors.pop(TARGET_FORWARD, 0.0)
    known = [floor for floor in floors.values() if floor is not None]
    if target_s is None or len(known) < len(floors) or not known:
        return None
    if work["target_ranks"]:
        return max(sum(known), target_s)
    return sum(known) + target_s


def largest_gap(parts: Sequence[Part]) -> str | None:
    """Return a sentence on the part that exceeds its least time by most, and what would shorten it; None = unknown."""
    gaps = {part: part.measured_s - part.floor_s for part in parts if part.measured_s and part.floor_s}
    if not gaps:
        return None
    part = max(gaps, key=lambda candidate: gaps[candidate])
    assert part.measured_s is not None and part.floor_s is not None
    ratio = part.measured_s / part.floor_s
    found = f"The {part.name} exceeds its least time by most: it takes {ratio:.2f} times as long, and is bound by {part.bound}"
    if part.key == OPTIMIZER:
        return f"{found}. A higher ZeRO stage divides it over ranks, and gradient_accumulation_steps makes it rarer."
    if ratio < NEAR:
        return f"{found}. This is near the device's limit; more ranks shorten a step."
    if part.bound == "memory":
        return f"{found}. Larger micro-batches ({LARGER}) read the weights less often."
    return f"{found}. Larger micro-batches ({LARGER}) make larger products; overlap.trace_steps shows what runs between them."


def _what_was_counted(work: Mapping[str, Any], peak: HardwarePeak | None) -> str:
    batches = f"{work['counted_batches']} micro-batches of {work['tokens']:,.0f} tokens on average"
    counted = f"Work of one rank per step, counted from {batches}, {work['accumulation']} per step."
    if work["without_target"]:
        counted = f"{counted} The target is not included: {work['without_target']}."
    if peak is None:
        unknown = "No datasheet is known for this device, so its peak, and the least time, are unknown."
        return f"{counted} Device: {work['device']}. {unknown}"
    dtypes = dict.fromkeys(str(facts["dtype"]) for facts in work["pieces"] if facts["flops"])
    rates = []
    for dtype in dtypes:
        rate = _peak_flops(peak, dtype)
        rates.append(f"{'unknown' if rate is None else with_prefix(rate, 'FLOP/s')} in {dtype}")
    return f"{counted} {peak.name}, from its datasheet: {', '.join(rates)}, {with_prefix(peak.bytes_per_s, 'B/s')}."


def _chart(parts: Sequence[Part]) -> str:
    """Return the roofline chart, or "" if the device's peak is unknown."""
    pieces = [piece for part in parts for piece in part.pieces if piece.flops]
    roofs = {}
    for piece in pieces:
        if piece.peak_flops is not None and piece.bytes_per_s is not None:
            roofs[piece.dtype] = Roof(piece.dtype, piece.peak_flops, piece.bytes_per_s)
    points = []
    for colour, part in enumerate(parts):
        if part.measured_s and part.flops and part.bytes:
            points.append(RoofPoint(part.name, part.flops / part.bytes, part.flops / part.measured_s, colour))
    return roofline_chart("Achieved rate of each part, under the roof of the device", points, list(roofs.values()))


def _details(parts: Sequence[Part]) -> str:
    rows = []
    for part in parts:
        if len(part.pieces) > 1:
            for piece in sorted(part.pieces, key=lambda piece: piece.floor_s or piece.flops, reverse=True):
                alone = Part(part.key, (piece,), None)
                name, flops, traffic, intensity, _, _, floor, _, bound = alone.cells
                limits = () if piece.bytes_per_s is None else (floor, bound)
                rows.append((name, piece.name, flops, traffic, intensity, *limits))
    if not rows:
        return ""
    shown = table(PIECE_HEADINGS[: len(rows[0])], rows)
    return f"<details><summary>Pieces of each part</summary>{shown}</details>"
