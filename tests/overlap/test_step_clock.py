import time

import pytest
import torch

from engine.overlap.step_clock import DRAFT_FORWARD, PARTS, TARGET_FORWARD, StepClock, efficiency, split_ratio

CPU = torch.device("cpu")


def test_the_time_of_each_part_is_counted_once():
    clock = StepClock(CPU)
    for _ in range(2):
        with clock.span(TARGET_FORWARD):
            time.sleep(0.02)
    began = clock.mark()
    time.sleep(0.01)
    clock.add(DRAFT_FORWARD, began)
    seconds = clock.take_seconds()
    assert seconds[TARGET_FORWARD] >= 0.04 and seconds[DRAFT_FORWARD] >= 0.01
    assert sum(clock.take_seconds().values()) == 0


class FakeMark:
    """A mark that the device passes when `passed` says so."""

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s
        self.passed = False

    def is_passed(self) -> bool:
        return self.passed

    def seconds_since(self, earlier: "FakeMark") -> float:
        assert self.passed, "the host would have to wait for the device"
        return self.at_s - earlier.at_s


def test_what_the_device_has_not_passed_is_read_later(monkeypatch):
    clock = StepClock(CPU)
    marks = [FakeMark(at_s) for at_s in (0.0, 1.0, 1.0, 4.0)]
    upcoming = iter(marks)
    monkeypatch.setattr(clock, "mark", lambda: next(upcoming))
    for part in (TARGET_FORWARD, DRAFT_FORWARD):
        with clock.span(part):
            pass
    assert sum(clock.take_seconds().values()) == 0
    marks[1].passed = True
    assert clock.take_seconds()[TARGET_FORWARD] == 1
    marks[3].passed = True
    seconds = clock.take_seconds()
    assert (seconds[TARGET_FORWARD], seconds[DRAFT_FORWARD]) == (0, 3)


@pytest.mark.parametrize(
    ("target_s", "draft_s", "step_s", "expected"),
    [(2.0, 1.0, 3.0, 0.0), (2.0, 1.0, 2.0, 1.0), (2.0, 1.0, 2.5, 0.5), (1.0, 2.0, 4.0, -1.0), (0.0, 1.0, 1.0, 0.0)],
)
def test_efficiency_is_the_hidden_share_of_the_shorter_side(target_s, draft_s, step_s, expected):
    seconds = dict.fromkeys(PARTS, 0.0) | {TARGET_FORWARD: target_s, DRAFT_FORWARD: draft_s}
    assert efficiency(seconds, step_s) == pytest.approx(expected)


def test_the_trace_holds_the_steps_that_were_asked_for():
    clock = StepClock(CPU, trace_steps=(2, 3))
    for step in range(1, 6):
        clock.step = step
        with clock.span(TARGET_FORWARD, batch=step):
            time.sleep(0.002)
    events = clock.trace_events(rank=7)
    assert [event["args"] for event in events] == [{"step": step, "batch": step} for step in (2, 3)]
    assert all(event["pid"] == 7 and event["dur"] >= 2000 and event["tid"] == "target" for event in events)
    assert events[0]["ts"] + events[0]["dur"] <= events[1]["ts"]
    assert abs(events[0]["ts"] / 1e6 - time.time()) < 60


def test_a_clock_that_nobody_reads_keeps_few_spans():
    clock = StepClock(CPU)
    for _ in range(5000):
        with clock.span(TARGET_FORWARD):
            pass
        with clock.host_span("data"):
            pass
    assert len(clock._pending) <= 512 and clock.take_seconds()[TARGET_FORWARD] > 0


def test_the_ratio_of_a_split_balances_both_sides():
    seconds = dict.fromkeys(PARTS, 0.0) | {"target_forward": 2.0, "draft_forward": 1.0, "backward": 2.5, "optimizer": 0.5}
    assert split_ratio(seconds) == "1 rank for the target to 2.0 for the draft"
    assert split_ratio(seconds | {"target_forward": 6.0}) == "1.5 ranks for the target to 1 for the draft"
    assert split_ratio(seconds | {"target_forward": 0.0}) is None
