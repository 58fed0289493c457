"""Warnings from made-up figures: each is printed once, counted, and about the right thing."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.host.hardware import HOST_MEMORY_SHARE, OWN_CPUS, SWAP, HardwareReading
from engine.host.nvml_gpu import CLOCK
from engine.overlap.step_clock import PARTS
from engine.parallel.mesh import World
from engine.runtime.run_warnings import (
    LoggedInterval,
    RunWarnings,
    Warned,
    judge_clock,
    judge_memory,
    judge_swapping,
    judge_waiting,
)

NOTHING = HardwareReading()
BALANCED = {"target_forward": 0.8, "draft_forward": 0.4, "backward": 0.5}
FOR_TARGET = BALANCED | {"wait_for_target": 0.2}
FOR_DATA = BALANCED | {"wait_for_target": 0.6, "data": 0.9}
FOR_DATA_A_LITTLE = BALANCED | {"wait_for_target": 0.2, "data": 0.9}
IN_TURN_FOR_DATA = {"data": 0.6, "target_forward": 0.1, "draft_forward": 0.2}
IN_TURN_FOR_STORE = {"data": 0.1, "target_forward": 0.6, "draft_forward": 0.2}


def interval(reading: HardwareReading = NOTHING, seconds: float = 30.0, **parts_s: float) -> LoggedInterval:
    return LoggedInterval(seconds, 1.0, dict.fromkeys(PARTS, 0.0) | (parts_s or BALANCED), reading)


def slowed(num_slowed: int, num_samples: int, clock_mhz: float = 1400.0, **reasons: int) -> LoggedInterval:
    names = {name.replace("_", " "): count for name, count in reasons.items()}
    mean = {CLOCK: clock_mhz} if num_samples else {}
    return interval(HardwareReading(mean, {}, num_samples, num_slowed, names, 1980.0))


def test_a_clock_is_held_back_if_it_is_in_most_samples():
    found = judge_clock([slowed(30, 30, power_limit=30, temperature=2), slowed(10, 30, power_limit=10)])
    assert "67%" in found["throttling"] and "(power limit, temperature), at 1,400 of 1,980 MHz" in found["throttling"]
    assert not judge_clock([slowed(30, 30, power_limit=30), slowed(0, 30)])
    assert not judge_clock([slowed(0, 0)])


def test_a_power_limit_alone_is_a_warning_only_if_the_clock_is_far_below_its_maximum():
    assert not judge_clock([slowed(30, 30, 1500.0, power_limit=30)])
    assert not judge_clock([slowed(30, 30, 1500.0, power_limit=30, temperature=2)])
    assert judge_clock([slowed(30, 30, 1400.0, power_limit=30)])
    assert judge_clock([slowed(30, 30, 1500.0, power_limit=30, temperature=20)])


@pytest.mark.parametrize(("rates", "warns"), [((0, 0), False), ((2e7, 0), False), ((1e5, 1e5), False), ((2e7, 1e7), True)])
def test_swapping_is_steady(rates, warns):
    intervals = [interval(HardwareReading({SWAP: float(rate)})) for rate in rates]
    assert ("swapping" in judge_swapping(intervals)) == warns
    assert not judge_swapping([interval()])


def test_memory_is_almost_full():
    assert "96%" in judge_memory(interval(HardwareReading({}, {HOST_MEMORY_SHARE: 0.961})))["host-memory"]
    assert not judge_memory(interval(HardwareReading({}, {HOST_MEMORY_SHARE: 0.95}))) and not judge_memory(interval())


@pytest.mark.parametrize(
    ("parts_s", "reads_store", "name", "fact"),
    [
        (BALANCED, False, None, ""),
        (FOR_TARGET, False, "target-bound", "20% of a step"),
        (FOR_DATA, False, "loader-bound", "60% of a step"),
        (FOR_DATA_A_LITTLE, False, None, ""),
        (IN_TURN_FOR_DATA, False, "loader-bound", "60% of a step"),
        (IN_TURN_FOR_STORE, True, "loader-bound", "70% of a step"),
        (IN_TURN_FOR_STORE, False, None, ""),
    ],
)
def test_what_a_draft_waits_for(parts_s, reads_store, name, fact):
    reading = HardwareReading({OWN_CPUS: 1.5})
    found = judge_waiting([interval(reading, 10, **parts_s), interval(reading, 50, **parts_s)], reads_store)
    assert list(found) == ([] if name is None else [name])
    if name is not None:
        assert fact in found[name] and ("1.5 processors" in found[name]) == (name == "loader-bound")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "warnings.jsonl").read_text().splitlines()]


def test_a_warning_is_printed_once_and_its_count_is_written(tmp_path):
    printed: list[str] = []
    warnings = RunWarnings(tmp_path, World.alone(), 0, printed.append)
    warnings.add(1, interval(seconds=90.0, **FOR_TARGET))  # compiles kernels
    warnings.add(2, interval(**FOR_TARGET))
    assert not printed, "30 s are too few"
    for step in (3, 4, 5):
        warnings.add(step, interval(**FOR_TARGET))
    assert len(printed) == 1 and "target-bound: the draft waits for 20%" in printed[0]
    for step in (6, 7, 8):
        warnings.add(step, interval())
    assert not (tmp_path / "warnings.jsonl").exists()
    for _ in range(2):
        warnings.write()
        (line,) = lines(tmp_path)
        assert (line["step"], line["name"], line["rank"], line["count"]) == (3, "target-bound", 0, 3)
        assert line["text"] in printed[0]


def test_short_steps_are_judged_every_few_seconds(tmp_path):
    warnings = RunWarnings(tmp_path, World.alone(), 0, lambda text: None)
    for step in range(1, 82):  # the first is not judged
        warnings.add(step, interval(seconds=1.0, **FOR_TARGET))
    warnings.write()
    assert lines(tmp_path)[0]["step"] == 61 and lines(tmp_path)[0]["count"] == 5, "after 60, 65, 70, 75 and 80 s"


class TwoRanks(World):
    """Rank 0 of two; the other one has sent its warnings."""

    def gather(self, value):
        return [value, [Warned(7, "throttling", 1, 4, "slow")]]


def test_other_ranks_warn_of_their_own_gpu_and_rank_0_writes_for_them(tmp_path):
    printed: list[str] = []
    warnings = RunWarnings(tmp_path, World(1, 2, 1, 2), 0, printed.append)
    for step in (1, 2, 3):
        warnings.add(step, interval(slowed(30, 30, power_limit=30).reading, **FOR_TARGET))
    assert len(printed) == 1 and "rank 1: throttling" in printed[0] and not list(tmp_path.iterdir())
    main = RunWarnings(tmp_path, TwoRanks(0, 2, 0, 2), 0, printed.append)
    main.add(1, interval(HardwareReading({}, {HOST_MEMORY_SHARE: 0.99})))
    main.write()
    found = [(line["step"], line["name"], line["rank"], line["count"]) for line in lines(tmp_path)]
    assert found == [(1, "host-memory", 0, 1), (7, "throttling", 1, 4)]


def test_a_resumed_run_continues_the_counts_of_the_steps_before_it(tmp_path):
    path = tmp_path / "warnings.jsonl"
    earlier = [Warned(5, "throttling", 1, 2, "very slow"), Warned(9, "swapping", 0, 2, "swaps")]
    path.write_text("".join(json.dumps(asdict(warned)) + "\n" for warned in earlier) + '{"step": 3')
    RunWarnings(tmp_path, World(1, 2, 1, 2), 0, print)
    assert len(path.read_text().splitlines()) == 3, "rank 0 alone changes the file"
    warnings = RunWarnings(tmp_path, TwoRanks(0, 2, 0, 2), 7, print)
    assert [line["step"] for line in lines(tmp_path)] == [5]
    warnings.write()
    assert lines(tmp_path) == [{"step": 5, "name": "throttling", "rank": 1, "count": 6, "text": "very slow"}]
    RunWarnings(tmp_path, World.alone(), 0, print)
    assert not path.exists()


def test_a_warning_that_cannot_be_written_is_printed_all_the_same(tmp_path):
    printed: list[str] = []
    warnings = RunWarnings(tmp_path / "gone", World.alone(), 0, printed.append)
    warnings.add(1, interval(HardwareReading({}, {HOST_MEMORY_SHARE: 0.99})))
    warnings.write()
    assert len(printed) == 1
