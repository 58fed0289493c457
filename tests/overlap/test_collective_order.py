"""The order of collectives, recorded on real ranks."""

import time

import pytest
import torch
from torch import distributed

from engine.overlap.collective_order import Collective, CollectiveOrder, CollectiveOrderError, find_deadlock
from engine.overlap.look_ahead import Limits
from engine.overlap.pipeline import Pipeline, Producer, ThreadedPipeline, TurnsPipeline
from engine.overlap.step_clock import DRAFT_PARTS, StepClock
from engine.parallel.mesh import TargetMesh, World
from tests.distributed import run_ranks

CPU = torch.device("cpu")
STEPS = 6
GROUPS = 3


def steps_with_collectives(world: World) -> list[str]:
    """What each kind of pipeline reports, if the ranks' target and draft take different times."""
    mesh = TargetMesh.make(world, tp_size=world.size, ep_size=1)
    reports = []
    for kind in (TurnsPipeline, ThreadedPipeline):
        order = CollectiveOrder()
        work: Pipeline

        def prepare(item: int) -> torch.Tensor:
            values = torch.ones(4)
            for group in range(GROUPS):
                time.sleep(0.01 * ((item + world.rank) % 2))
                distributed.all_reduce(values, group=mesh.tp.process_group)
                if group < GROUPS - 1:
                    work.pause()  # noqa: B023 (called while this pipeline is open)
            return values

        producer = Producer(range(STEPS), order.recorded(prepare))
        clock = StepClock(CPU)
        if kind is TurnsPipeline:
            work = TurnsPipeline(producer, clock, Limits(1), CPU, num_pauses=GROUPS - 1)
        else:
            work = ThreadedPipeline(producer, clock, Limits(1), CPU)
        sums = []
        report = "same"
        with work, order.recording():
            for values in work:
                sums.append(values.sum().item())
                for part in DRAFT_PARTS:
                    with work.part(part):
                        time.sleep(0.012 * world.rank)
                        distributed.all_reduce(torch.ones(2))
        if kind is TurnsPipeline:
            assert len(order.issued) == STEPS * (GROUPS + len(DRAFT_PARTS))
            assert {collective.group for collective in order.issued} == {"default_pg", "target"}
        assert sums == [4.0 * world.size**GROUPS] * STEPS
        try:
            order.compare(world)
        except CollectiveOrderError as error:
            report = str(error)
        assert order.issued == [], "the comparison itself is not recorded"
        reports.append(report)
    return reports


def test_in_turns_all_ranks_issue_collectives_in_one_order_and_without_turns_the_difference_is_found():
    for in_turns, threaded in run_ranks(steps_with_collectives, 2):
        assert in_turns == "same"
        assert "different orders" in threaded and "rank 0" in threaded and "rank 1" in threaded


def of(name: str, *ranks: int) -> Collective:
    return Collective(name, "target" if len(ranks) < 4 else "default_pg", ranks)


WORLD = of("allreduce", 0, 1, 2, 3)
LEFT = of("allgather", 0, 1)
RIGHT = of("allgather", 2, 3)


@pytest.mark.parametrize(
    "issued",
    [
        [[], [], [], []],
        [[LEFT, WORLD], [LEFT, WORLD], [RIGHT, WORLD], [RIGHT, WORLD]],
        [[WORLD, LEFT, WORLD], [WORLD, LEFT, WORLD], [WORLD, WORLD], [WORLD, WORLD]],  # a copy without slots skips the head
        [[LEFT, LEFT, WORLD], [LEFT, LEFT, WORLD], [WORLD, RIGHT], [WORLD, RIGHT]],
    ],
)
def test_copies_of_the_target_may_issue_different_numbers_of_their_own(issued):
    assert find_deadlock(issued) is None


@pytest.mark.parametrize(
    ("issued", "expected"),
    [
        ([[LEFT, WORLD], [WORLD, LEFT], [WORLD], [WORLD]], "rank 0 would wait in allgather.*and rank 1 in allreduce"),
        ([[LEFT, WORLD], [LEFT, WORLD], [WORLD], []], "rank 0 would wait in allreduce.*and rank 3 in the end of the step"),
        ([[LEFT], [of("reduce", 0, 1)], [], []], "rank 0 would wait in allgather.*and rank 1 in reduce"),
        (
            [[of("a", 0, 1), of("c", 0, 2)], [of("b", 1, 2), of("a", 0, 1)], [of("c", 0, 2), of("b", 1, 2)]],
            "rank 0 would wait in a .*and rank 1 in b",
        ),
    ],
)
def test_ranks_that_would_wait_for_each_other_are_named(issued, expected):
    class FakeWorld:
        def gather(self, own):
            return issued

    with pytest.raises(CollectiveOrderError, match=expected):
        CollectiveOrder().compare(FakeWorld())
