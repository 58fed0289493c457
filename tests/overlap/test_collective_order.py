"""The order of collectives, recorded on real ranks."""

import threading
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
from tests.waiting import HANG_S, wait_until

CPU = torch.device("cpu")
STEPS = 6
GROUPS = 3


class Rivals:
    """Makes the threads of a rank issue the second batch's first collective and the draft's first one in a given order."""

    def __init__(self, issued: list[Collective], target_first: bool | None) -> None:
        """issued: what the rank has issued so far. target_first: None = as they come."""
        self._issued = issued
        self._target_first = target_first
        self._target_has_begun, self._draft_has_begun = threading.Event(), threading.Event()

    def before_target(self, item: int) -> None:
        if item == 1:
            self._target_has_begun.set()
            if self._target_first is False:
                assert self._draft_has_begun.wait(HANG_S)

    def before_draft(self) -> None:
        if self._target_first:
            assert self._target_has_begun.wait(HANG_S)
            wait_until(self._target_waits, tell=lambda: "The target should issue its collective.")

    def _target_waits(self) -> bool:
        """Whether the target has issued the second batch's first collective, which then waits for the other rank."""
        num_issued = sum(collective.group == "target" for collective in list(self._issued))
        return num_issued > GROUPS

    def after_draft(self) -> None:
        self._draft_has_begun.set()


def report_of(world: World, mesh: TargetMesh, in_turns: bool) -> str:
    """What is reported of a run whose target and draft take other times on each rank."""
    order = CollectiveOrder()
    rivals = Rivals(order.issued, None if in_turns else world.rank == 0)
    work: Pipeline

    def prepare(item: int) -> torch.Tensor:
        values = torch.ones(4)
        rivals.before_target(item)
        for group in range(GROUPS):
            time.sleep(0.002 * ((item + world.rank) % 2))
            distributed.all_reduce(values, group=mesh.tp.process_group)
            if group < GROUPS - 1:
                work.pause()
        return values

    producer = Producer(range(STEPS), order.recorded(prepare))
    clock = StepClock(CPU)
    if in_turns:
        work = TurnsPipeline(producer, clock, Limits(1), CPU, num_pauses=GROUPS - 1)
    else:
        work = ThreadedPipeline(producer, clock, Limits(1), CPU)
    sums = []
    pending = []
    with work, order.recording():
        for values in work:
            sums.append(values.sum().item())
            for part in DRAFT_PARTS:
                with work.part(part):
                    rivals.before_draft()
                    pending.append(distributed.all_reduce(torch.ones(2), async_op=True))
                    rivals.after_draft()
    for each in pending:
        each.wait()
    assert sums == [4.0 * world.size**GROUPS] * STEPS
    assert len(order.issued) == STEPS * (GROUPS + len(DRAFT_PARTS))
    assert {collective.group for collective in order.issued} == {"default_pg", "target"}
    report = "none"
    try:
        order.compare(world)
    except CollectiveOrderError as error:
        report = str(error)
    assert order.issued == [], "the comparison itself is not recorded"
    return report


def reports_of(world: World) -> list[str]:
    mesh = TargetMesh.make(world, tp_size=world.size, ep_size=1)
    return [report_of(world, mesh, in_turns) for in_turns in (True, False)]


def test_in_turns_no_ranks_wait_for_each_other_and_without_turns_they_are_found():
    for in_turns, threaded in run_ranks(reports_of, 2):
        assert in_turns == "none"
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
