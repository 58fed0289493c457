"""Metrics are read a step late, and every step has exactly one line wherever a run stops."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.host.hardware import HardwareReading, HardwareSampler
from engine.host.nvml_gpu import POWER
from engine.overlap.step_clock import DRAFT_FORWARD, PARTS, TARGET_FORWARD, WAIT, StepClock
from engine.parallel.mesh import World
from engine.parallel.objective import DivisorScope
from engine.runtime.fault_watch import FaultWatch, WatchSettings
from engine.runtime.run_warnings import RunWarnings
from engine.runtime.train_log import LogSettings, TrainLog, _progress_line
from tests.runtime.test_metrics import FIRST, SECOND


class LateSum:
    """A sum that arrives when it is waited for, or never."""

    def __init__(self, values: torch.Tensor, arrives: bool) -> None:
        self._values = values.clone()
        self._arrives = arrives

    def is_ready(self) -> bool:
        return self._arrives

    def wait(self) -> torch.Tensor:
        assert self._arrives, "the run would hang"
        return self._values


class CountingWorld(World):
    """One rank that counts its collectives."""

    def start_sum(self, values: torch.Tensor) -> LateSum:
        COLLECTIVES.append(values.numel())
        return LateSum(values, arrives=ARRIVES[0])


WATCH = WatchSettings((0, 1, 3), lambda index: f"document {index}", stops=False, skips=False, folder=Path("nowhere"))
WARNINGS: list[str] = []
COLLECTIVES: list[int] = []
ARRIVES = [True]
BATCH = SimpleNamespace(document_ids=(0,), host_lengths=(10,))
MICRO = SimpleNamespace(num_tokens=10, num_left_out=0, faults=None, batch=BATCH, peak_s=0.001)


@pytest.fixture
def zero() -> SimpleNamespace:
    """Stands in for a ZeroDraft with two TTT steps."""
    COLLECTIVES.clear()
    ARRIVES[0] = True
    objective = SimpleNamespace(num_steps=2, step_weights=[1.0, 0.5], divisor_scope=DivisorScope.MICRO_BATCH)
    facts = {"learning_rate": 0.5, "accumulation_steps": 1, "num_skipped_steps": 0, "grad_norm": None}
    monitored: list[dict] = []
    return SimpleNamespace(
        objective=objective, monitored=monitored, write_monitors=lambda values, step: monitored.append(values), **facts
    )


class Hardware(HardwareSampler):
    """Uses 500 joules from one call to the next."""

    def take(self) -> HardwareReading:
        return replace(super().take(), joules=500.0, mean={POWER: 250.0})

    def take_joules(self) -> float:
        return 500.0


def open_log(
    folder: Path,
    zero: SimpleNamespace,
    every_steps: int = 1,
    num_steps: int = 5,
    clock: StepClock | None = None,
    first_step: int = 0,
    hardware: HardwareSampler | None = None,
) -> TrainLog:
    world = CountingWorld(0, 1, 0, 1)
    return TrainLog(
        LogSettings(folder, every_steps, first_step, num_steps),
        zero,
        world,
        FaultWatch(WATCH, WARNINGS.append),
        clock or StepClock(torch.device("cpu")),
        hardware or HardwareSampler(),
        RunWarnings(folder, world, first_step, WARNINGS.append),
    )


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_written_once_the_next_has_been_issued(tmp_path, zero):
    written = []
    with open_log(tmp_path, zero) as log:
        for step in range(1, 6):
            log.count(step, FIRST if step % 2 else SECOND, MICRO)
            zero.learning_rate = step / 10
            log.placement = None if step == 1 else "serial"
            log.end_step(step)
            written.append([line["step"] for line in lines(tmp_path)])
    assert written == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5]]
    assert [line["lr"] for line in lines(tmp_path)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [line["loss"] for line in lines(tmp_path)] == [4.0, 1.0, 4.0, 1.0, 4.0]
    assert [line["placement"] for line in lines(tmp_path)] == [None, *["serial"] * 4]
    assert len(COLLECTIVES) == 5, "one collective per logged step"


def test_a_line_is_the_mean_over_the_steps_since_the_last(tmp_path, zero):
    with open_log(tmp_path, zero, every_steps=2, num_steps=3) as log:
        for step in (1, 2, 3):
            log.count(step, FIRST if step % 2 else SECOND, MICRO)
            log.end_step(step)
    assert [(line["step"], line["loss"], line["tokens"]) for line in lines(tmp_path)] == [(2, 2.5, 20), (3, 4.0, 10)]
    assert len(COLLECTIVES) == 2


def test_a_line_accounts_for_the_time_of_its_steps(tmp_path, zero):
    clock = StepClock(torch.device("cpu"))
    with open_log(tmp_path, zero, every_steps=2, num_steps=2, clock=clock) as log:
        for step in (1, 2):
            for part in (TARGET_FORWARD, DRAFT_FORWARD):
                with clock.span(part):
                    time.sleep(0.01)
            log.count(step, FIRST, MICRO)
            log.end_step(step)
    (line,) = lines(tmp_path)
    parts_s = line["parts_s"]
    assert parts_s[TARGET_FORWARD] >= 0.01 and parts_s[DRAFT_FORWARD] >= 0.01
    assert sum(parts_s.values()) <= line["step_s"]
    assert line["overlap_efficiency"] <= 0, "one after the other"


def test_a_line_has_the_energy_and_the_utilisation_of_its_steps(tmp_path, zero):
    with open_log(tmp_path, zero, every_steps=2, num_steps=3, hardware=Hardware()) as log:
        for step in (1, 2, 3):
            time.sleep(0.01)
            log.count(step, FIRST, MICRO)
            log.end_step(step)
    two, one = lines(tmp_path)
    assert two["joules_per_million_tokens"] == 500 / 20 * 1e6 and one["joules_per_million_tokens"] == 500 / 10 * 1e6
    assert two["mfu"] == pytest.approx(0.001 / two["step_s"]) and 0 < one["mfu"] < 0.1
    assert one["gpu_power_w"] == 250 and one["gpu_utilization"] is None
    assert "MFU" in log.line and "acceptance " in log.line


def test_monitors_get_no_unknown_values(tmp_path, zero):
    with open_log(tmp_path, zero, num_steps=1) as log:
        log.count(1, FIRST, SimpleNamespace(**vars(MICRO) | {"peak_s": None}))
        log.end_step(1)
    (line,) = lines(tmp_path)
    (values,) = zero.monitored
    assert line["mfu"] is line["joules_per_million_tokens"] is line["gpu_power_w"] is None and "non_finite" not in line
    assert "loss" in values and all(isinstance(value, float) for value in values.values())
    assert not {"mfu", "gpu_power_w"} & set(values) and "MFU" not in log.line


def test_a_resumed_line_counts_what_was_done_before_the_checkpoint(tmp_path, zero):
    clock = StepClock(torch.device("cpu"))
    with open_log(tmp_path, zero, every_steps=4, num_steps=8, clock=clock, hardware=Hardware()) as log:
        with clock.span(DRAFT_FORWARD):
            time.sleep(0.05)
        log.count(1, FIRST, MICRO)
        log.end_step(1)
        state = log.state()
    with open_log(tmp_path, zero, every_steps=2, num_steps=8, first_step=1, hardware=Hardware()) as log:
        log.restore([state])
        log.count(2, FIRST, MICRO)
        log.end_step(2)
    (line,) = lines(tmp_path)
    assert line["joules_per_million_tokens"] == 1000 / 20 * 1e6
    assert line["mfu"] == pytest.approx(0.001 / line["step_s"])
    assert line["step_s"] >= 0.025 and line["parts_s"][DRAFT_FORWARD] >= 0.025


@pytest.mark.parametrize(
    ("parts_s", "shown"),
    [
        ({TARGET_FORWARD: 0.4, DRAFT_FORWARD: 0.5}, "target 40%, draft 50%, waiting 0%, rest 10%"),
        ({TARGET_FORWARD: 0.9, WAIT: 0.3, DRAFT_FORWARD: 0.6}, "draft 60%, waiting 30%, rest 10%, overlapped by target 90%"),
    ],
)
def test_the_progress_line_is_short(parts_s, shown):
    metrics = {"loss": 1.5, "accuracy_per_step": [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.05], "simulated_acceptance_length": 2.25}
    metrics |= {"placement": None, "tokens_per_s": 12345.6, "step_s": 1.0, "memory_gib": 3.25, "mfu": 0.314}
    metrics["parts_s"] = dict.fromkeys(PARTS, 0.0) | parts_s
    line = _progress_line(metrics)
    assert line == f"loss 1.500  accuracy 50% 30% 5%  acceptance 2.25  12,346 tokens/s  MFU 31%  {shown}  3.2 GiB"


def test_a_flush_leaves_nothing_behind_for_a_checkpoint_to_miss(tmp_path, zero):
    with open_log(tmp_path, zero) as log:
        log.count(1, FIRST, MICRO)
        log.end_step(1)
        log.flush()
        assert [line["step"] for line in lines(tmp_path)] == [1]
        log.flush()
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_an_error_still_leaves_the_line_of_the_step_before_it(tmp_path, zero):
    with pytest.raises(ValueError, match="a bad batch"), open_log(tmp_path, zero) as log:
        log.count(1, FIRST, MICRO)
        log.end_step(1)
        raise ValueError("a bad batch")
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_an_error_is_not_held_up_by_ranks_that_are_gone(tmp_path, zero, monkeypatch):
    monkeypatch.setattr("engine.runtime.train_log.SECONDS_AFTER_ERROR", 0.05)
    ARRIVES[0] = False
    with pytest.raises(ValueError, match="a bad batch"), open_log(tmp_path, zero) as log:
        log.count(1, FIRST, MICRO)
        log.end_step(1)
        raise ValueError("a bad batch")
    assert not lines(tmp_path)
