"""What a process knows of the others."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.parallel.collectives import gather_objects, sum_over
from engine.parallel.mesh import TargetMesh, World, check_sizes
from tests.distributed import run_ranks

ALONE = World.alone()


@dataclass(frozen=True)
class Seen:
    """What one of two ranks saw."""

    is_main: bool
    given: torch.Tensor
    total: torch.Tensor
    any_rank: list[bool]


def look(world: World) -> Seen:
    given = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    total = world.sum(given)
    world.barrier()
    any_rank = world.any_rank([False, world.rank == 1, True])
    return Seen(world.is_main, given, total, any_rank)


def fail_on_the_second(world: World) -> None:
    if world.rank == 1:
        raise ValueError("rank 1 has had enough")
    world.barrier()


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    return run_ranks(look, 2)


def test_one_rank_is_main(seen):
    assert [rank.is_main for rank in seen] == [True, False]


def test_sum_reaches_every_rank_and_leaves_its_argument_alone(seen):
    for index, rank in enumerate(seen):
        assert rank.total.tolist() == [3, 30]
        assert rank.given.tolist() == [index + 1, 10 * (index + 1)]


def test_a_flag_of_one_rank_reaches_every_rank(seen):
    for rank in seen:
        assert rank.any_rank == [False, True, True]
    assert ALONE.any_rank([False, True]) == [False, True]


def test_a_process_alone_needs_no_process_group():
    values = torch.ones(2)
    assert torch.equal(ALONE.sum(values), values) and ALONE.sum(values) is not values
    ALONE.barrier()


def test_a_failing_rank_names_itself_and_ends_the_others():
    with pytest.raises(Exception, match="rank 1 has had enough"):
        run_ranks(fail_on_the_second, 2)


@pytest.mark.parametrize(
    ("ranks", "tp", "ep", "words"),
    [
        (8, 3, 1, r"parallel.tp_size=3 does not divide 8 ranks; use one of \[1, 2, 4, 8\]"),
        (8, 1, 6, r"parallel.ep_size=6 does not divide 8 ranks"),
        (12, 4, 6, r"parallel.ep_size=6 and tp_size=4: one must divide the other; use one of \[1, 2, 4, 12\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_would(ranks, tp, ep, words):
    with pytest.raises(ValueError, match=words):
        check_sizes(ranks, tp, ep)


def groups(world) -> list[tuple[int, int, int]]:
    meshes = [TargetMesh.make(world, tp, ep) for tp, ep in ((1, 1), (2, 1), (2, 4), (4, 2))]
    return [(mesh.size, mesh.tp.rank, mesh.ep.rank) for mesh in meshes]


def test_ranks_of_a_group_follow_one_another():
    for rank, found in enumerate(run_ranks(groups, 4)):
        assert found == [(1, 0, 0), (2, rank % 2, 0), (4, rank % 2, rank), (4, rank, rank % 2)]


class OnGpus(World):
    """A rank whose tensors would lie on a GPU."""

    device = torch.device("cuda")


def lengths_on_the_host(world) -> tuple[list, bool]:
    group = TargetMesh.make(OnGpus(**vars(world)), 2, 1).tp
    return gather_objects((world.rank, "documents"), group), group.host_group is group.process_group


def test_what_lies_on_the_host_does_not_go_through_the_device():
    for everyone, same in run_ranks(lengths_on_the_host, 2):
        assert everyone == [(0, "documents"), (1, "documents")] and not same


def stuck(world, ended: Path) -> float:
    group = TargetMesh.make(world, 2, 1, timeout_s=2).tp
    start = time.perf_counter()
    if world.rank == 0:
        with pytest.raises(RuntimeError):
            sum_over(torch.ones(1), group)
        took_s = time.perf_counter() - start
        ended.touch()
        return took_s
    while not ended.exists() and time.perf_counter() - start < 40:
        time.sleep(0.02)
    return 0.0


def test_a_group_that_is_stuck_is_ended_after_the_seconds_asked_for(tmp_path):
    assert 1 < run_ranks(stuck, 2, tmp_path / "ended")[0] < 30
