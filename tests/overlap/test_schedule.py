import json
import time

import pytest

from engine.config.sections import Config, OverlapSection, TargetSection
from engine.config.strict import ConfigError
from engine.overlap.pipeline import Producer
from engine.overlap.schedule import Schedule, Side, write_trace
from engine.overlap.step_clock import DRAFT_PARTS, StepClock
from engine.parallel.mesh import World

STEPS = 4


def run(side: Side, section: OverlapSection, accumulation: int) -> tuple[Schedule, list[list[int]]]:
    """A run of four steps, and the micro-batches of each."""
    producer = Producer(range(STEPS * accumulation), lambda item: time.sleep(0.001) or item)
    taken = []
    clock = StepClock(World.alone().device, section.traced)
    with Schedule.on_same_ranks(producer, side, section, World.alone(), clock, lambda line: None) as schedule:
        for step in range(1, STEPS + 1):
            micros = schedule.take(step, accumulation)
            taken.append(micros)
            for _ in micros:
                for part in DRAFT_PARTS:
                    with schedule.part(part):
                        time.sleep(0.001)
            schedule.end_step()
    return schedule, taken


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("look_ahead", [0, 1, 4])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("placement", ["serial", "colocated", "auto"])
def test_every_placement_gives_each_step_its_micro_batches(placement, num_ranks, look_ahead, accumulation):
    side = Side(placement, look_ahead, num_ranks)
    section = OverlapSection(check_order=look_ahead == 1, look_ahead_mb=1)
    _, taken = run(side, section, accumulation)
    assert taken == [list(range(step * accumulation, (step + 1) * accumulation)) for step in range(STEPS)]


def test_the_trace_has_both_sides_of_the_traced_steps(tmp_path):
    schedule, _ = run(Side("colocated", 1), OverlapSection(trace_steps=(2, 3)), accumulation=2)
    write_trace(tmp_path / "trace.json", schedule.clock, World.alone())
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events} == {"target", "draft"}
    assert {event["args"]["step"] for event in events} == {2, 3}
    backward = [event for event in events if event["name"] == "backward"]
    assert len(backward) == 4 and all(event["ph"] == "X" and event["dur"] > 0 for event in backward)


STORE = TargetSection(store="/store")


@pytest.mark.parametrize(
    ("config", "placement", "look_ahead"),
    [
        (Config(), "auto", 1),
        (Config(target=STORE), "colocated", 2),
        (Config(target=STORE, overlap=OverlapSection(placement="serial")), "serial", 2),
        (Config(target=STORE, overlap=OverlapSection(look_ahead=0)), "colocated", 0),
        (Config(overlap=OverlapSection(placement="colocated", look_ahead=3)), "colocated", 3),
    ],
)
def test_a_store_is_read_ahead_unless_the_user_says_otherwise(config, placement, look_ahead):
    assert (config.placement, config.look_ahead) == (placement, look_ahead)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"placement": "serial", "look_ahead": 1}, "overlap.look_ahead"),
        ({"trace_steps": (3,)}, "overlap.trace_steps"),
        ({"trace_steps": (5, 3)}, "overlap.trace_steps"),
        ({"trace_steps": (0, 3)}, "overlap.trace_steps"),
        ({"placement": "serial", "look_ahead_mb": 8}, "overlap.look_ahead_mb"),
        ({"placement": "serial", "priority": "draft"}, "overlap.priority"),
        ({"transfer_dtype": "bfloat16"}, "overlap.transfer_dtype"),
        ({"placement": "split", "target_ranks": 1, "check_order": True}, "overlap.check_order"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, key):
    with pytest.raises(ConfigError) as refused:
        OverlapSection(**options)
    assert refused.value.key == key
