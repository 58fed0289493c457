"""The scheduler without models: thousands of random jobs in the event model, and a few with the threads of the runtime."""

import random

import pytest
import torch

from engine.overlap.bridge import Sides
from engine.overlap.event_model import BatchCost, Deadlock, EventModel
from engine.overlap.look_ahead import Limits
from engine.overlap.pipeline import Producer, ThreadedPipeline
from engine.overlap.step_clock import StepClock
from tests.overlap.virtual_time import VirtualTime


def random_costs(generator: random.Random, count: int) -> list[BatchCost]:
    scale = generator.choice([0.1, 1.0, 10.0])
    return [
        BatchCost(
            target_s=generator.random() * scale,
            draft_s=generator.random(),
            transfer_s=generator.choice([0.0, generator.random() * 0.1]),
            num_bytes=generator.randrange(1, 100),
        )
        for _ in range(count)
    ]


def best_makespan(costs: list[BatchCost], limits: Limits, per_step: int) -> float:
    """The earliest end of the last step for one rank per side and no transfers, by recursion over the batches.

    A batch may begin once its consumer asks for it, or for an earlier one from which it is within the limits.
    """
    prepared_s: list[float] = []
    asked_s = [0.0]
    end_s = 0.0
    for index, cost in enumerate(costs):
        admitted_s = asked_s[index]
        for asked in range(max(0, index - limits.batches), index):
            between = sum(costs[other].num_bytes for other in range(asked + 1, index + 1))
            if limits.num_bytes is None or between <= limits.num_bytes:
                admitted_s = min(admitted_s, asked_s[asked])
        before_s = prepared_s[-1] if prepared_s else 0.0
        prepared_s.append(max(before_s, admitted_s) + cost.target_s)
        taken_s = max(asked_s[index], prepared_s[index])
        if (index + 1) % per_step:
            asked_s.append(taken_s)
        else:
            end_s = taken_s + sum(cost.draft_s for cost in costs[index + 1 - per_step : index + 1])
            asked_s.append(end_s)
    return end_s


@pytest.mark.parametrize("part", range(4))
def test_one_rank_per_side_is_never_slower_than_the_best_schedule(part):
    for seed in range(part * 500, (part + 1) * 500):
        generator = random.Random(seed)
        per_step = generator.randint(1, 4)
        num_steps = generator.randint(1, 12)
        limits = Limits(generator.randint(0, 5), generator.choice([None, generator.randrange(1, 300)]))
        costs = [
            BatchCost(cost.target_s, cost.draft_s, 0.0, cost.num_bytes)
            for cost in random_costs(generator, per_step * num_steps)
        ]
        timeline = EventModel(Sides(1, 1), limits, num_steps, per_step, lambda rank, index, costs=costs: costs[index]).run()
        assert timeline.step_ends_s[-1] == pytest.approx(best_makespan(costs, limits, per_step))
        assert timeline.taken == [(0, index) for index in range(len(costs))]
        assert timeline.most_bytes <= (limits.num_bytes if limits.num_bytes is not None else float("inf"))


@pytest.mark.parametrize("part", range(4))
def test_any_number_of_ranks_ends_in_order_and_within_the_limits(part):
    for seed in range(part * 250, (part + 1) * 250):
        generator = random.Random(seed)
        replica = generator.choice([1, 1, 2, 4])
        sides = Sides(generator.randint(1, 5), replica * generator.randint(1, 3), replica)
        per_step = generator.randint(1, 3)
        num_steps = generator.randint(1, 8)
        limits = Limits(sides.least_look_ahead + generator.randint(0, 3), 100 * max(1, sides.least_look_ahead))
        costs = [random_costs(generator, per_step * num_steps) for _ in range(sides.num_draft)]
        timeline = EventModel(sides, limits, num_steps, per_step, lambda rank, index, costs=costs: costs[rank][index]).run()
        for rank in range(sides.num_draft):
            assert [index for owner, index in timeline.taken if owner == rank] == list(range(per_step * num_steps))
        assert timeline.step_ends_s == sorted(timeline.step_ends_s) and len(timeline.step_ends_s) == num_steps
        total_target_s = sum(cost.target_s for own in costs for cost in own)
        longest_draft_s = max(sum(cost.draft_s for cost in own) for own in costs)
        assert timeline.target_s == pytest.approx(total_target_s)
        assert timeline.step_ends_s[-1] >= max(total_target_s / sides.num_target, longest_draft_s) - 1e-9


def test_a_look_ahead_below_what_a_copy_of_the_target_needs_would_stop_the_job():
    """The draft rank would ask for its second batch only after its first one, which is prepared together with it."""
    sides = Sides(1, 2, replica_size=2)
    with pytest.raises(Deadlock, match="after 0 of 3 steps"):
        EventModel(sides, Limits(0), 3, 1, lambda rank, index: BatchCost(1.0, 1.0)).run()
    EventModel(sides, Limits(sides.least_look_ahead), 3, 1, lambda rank, index: BatchCost(1.0, 1.0)).run()


def test_equal_sides_hide_each_other_and_strict_turns_do_not():
    even = BatchCost(target_s=1.0, draft_s=1.0, transfer_s=0.05)
    turns, ahead = (EventModel(Sides(1, 1), Limits(depth), 40, 1, lambda rank, index: even).run() for depth in (0, 2))
    assert turns.step_s(10) == pytest.approx(2.05) and ahead.step_s(10) == pytest.approx(1.0)


@pytest.mark.parametrize(("look_ahead", "target_s", "draft_s"), [(0, 0.01, 0.01), (1, 0.03, 0.03), (2, 0.02, 0.03)])
def test_the_runtime_takes_the_time_of_the_model(look_ahead, target_s, draft_s, monkeypatch):
    generator = random.Random(look_ahead)
    costs = [BatchCost(target_s * (0.5 + generator.random()), draft_s * (0.5 + generator.random())) for _ in range(30)]
    expected = EventModel(Sides(1, 1), Limits(look_ahead), 30, 1, lambda rank, index: costs[index]).run()
    cpu = torch.device("cpu")
    time = VirtualTime(monkeypatch)
    producer = Producer(costs, lambda cost: time.sleep(cost.target_s) or cost)
    step_ends_s = []
    with ThreadedPipeline(producer, StepClock(cpu), Limits(look_ahead), cpu) as work:
        for cost in work:
            time.sleep(cost.draft_s)
            step_ends_s.append(time.now_s)
    assert step_ends_s == pytest.approx(expected.step_ends_s)
    serial_s = sum(cost.target_s + cost.draft_s for cost in costs)
    assert (step_ends_s[-1] < 0.8 * serial_s) == (look_ahead > 0), "only with a look-ahead, both sides work at once"
