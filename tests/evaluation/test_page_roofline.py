"""Measured and least times: computed from the datasheet, and absent where there is none."""

from pathlib import Path
from typing import Any

import pytest

from engine.evaluation.page_roofline import largest_gap, measured_parts, roofline_section, step_floor_s
from engine.evaluation.run_record import RunRecord
from engine.models.costs import PEAKS

H200 = PEAKS["NVIDIA H200"]
PARTS_S = {"target_forward": 0.4, "draft_forward": 0.1, "backward": 0.2, "optimizer": 0.01}


def piece(part: str, name: str, flops: float, num_bytes: float, dtype: str = "bfloat16") -> dict[str, Any]:
    return {"part": part, "name": name, "flops": flops, "bytes": num_bytes, "dtype": dtype}


def work(**changes: Any) -> dict[str, Any]:
    pieces = [
        piece("target_forward", "target", 98.94e12, 4.8e9),  # 0.1 s of products, 1 ms of traffic
        piece("draft_forward", "fc", 9.894e12, 4.8e10),  # 10 ms each
        piece("draft_forward", "mlp", 9.894e11, 9.6e10),  # 1 ms, 20 ms
        piece("backward", "fc", 19.788e12, 4.8e9),  # 20 ms, 1 ms
        piece("optimizer", "optimizer", 0, 4.8e9, "float32"),  # 1 ms
    ]
    facts = {"device": H200.name, "draft_ranks": 4, "target_ranks": 0, "accumulation": 2, "tokens": 4096.0}
    return facts | {"counted_batches": 8, "pieces": pieces, "without_target": None} | changes


def test_the_least_time_of_a_part_is_the_sum_of_its_pieces():
    parts = {part.key: part for part in measured_parts(work(), PARTS_S, H200)}
    floors = {key: part.floor_s for key, part in parts.items()}
    assert floors == pytest.approx({"target_forward": 0.1, "draft_forward": 0.03, "backward": 0.02, "optimizer": 0.001})
    assert [part.bound for part in parts.values()] == ["compute", "memory", "compute", "memory"]
    name, flops, _, intensity, measured, achieved, floor, ratio, _ = parts["target_forward"].cells
    assert (name, flops, intensity, measured) == ("target forward", "98.9 TFLOP", "20,612", "400 ms")
    assert (achieved, floor, ratio) == ("247 TFLOP/s", "100 ms", "4.00")


@pytest.mark.parametrize(("target_ranks", "seconds"), [(0, 0.151), (8, 0.1)])
def test_the_least_time_of_a_step_depends_on_where_the_target_runs(target_ranks, seconds):
    """In turn on the same ranks; else the longer side, whose work is already that of one of its ranks."""
    counted = work(target_ranks=target_ranks)
    assert step_floor_s(counted, measured_parts(counted, PARTS_S, H200)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ("target forward", "overlap.trace_steps")),
        ({"target_forward": 0.15, "backward": 0.03, "draft_forward": 0.04}, ("target forward", "more ranks")),
        ({"draft_forward": 0.9}, ("draft forward", "read the weights less often")),
        ({"optimizer": 0.9}, ("optimizer", "ZeRO stage")),
    ],
)
def test_the_largest_gap_is_named_with_the_option_that_moves_it(changes, named):
    sentence = largest_gap(measured_parts(work(), PARTS_S | changes, H200))
    assert sentence is not None and sentence.startswith(f"The {named[0]} exceeds") and named[1] in sentence


def section(facts: dict[str, Any] | None, **metrics_of_step: Any) -> str:
    metrics = [{"step": 1, "step_s": 0.5, "parts_s": PARTS_S} | metrics_of_step]
    run = RunRecord(Path("run"), metrics, [], [], [], None, facts, "")
    return roofline_section(run, [run])


def test_the_section_shows_a_roof_only_where_the_peak_is_known():
    known = section(work())
    assert 'class="roof"' in known and "3.31 times its least time of 151 ms" in known and "4.8 TB/s" in known
    unknown = section(work(device="cpu<b>", without_target="it is <stored>"))
    assert "svg" not in unknown and "unknown" in unknown and "247 TFLOP/s" in unknown and "20,612" in unknown
    assert "cpu&lt;b&gt;" in unknown and "it is &lt;stored&gt;" in unknown
    assert section(None) == ""
    assert "exceeds its least time by most" in known
    assert "exceeds its least time by most" not in section(work(), placement="colocated")


def test_a_dtype_without_a_peak_leaves_its_part_without_a_least_time():
    counted = work(pieces=[piece("target_forward", "target", 1e12, 1e9, "float8_e4m3fn"), work()["pieces"][3]])
    page = section(counted)
    assert "unknown in float8_e4m3fn" in page and "989 TFLOP/s in bfloat16" in page
    assert step_floor_s(counted, measured_parts(counted, PARTS_S, H200)) is None
