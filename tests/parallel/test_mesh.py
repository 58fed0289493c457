"""What a process knows of the others."""

from dataclasses import dataclass

import pytest
import torch

from engine.parallel.mesh import World
from tests.distributed import run_ranks

ALONE = World.alone()


@dataclass(frozen=True)
class Seen:
    """What one of two ranks saw."""

    is_main: bool
    given: torch.Tensor
    total: torch.Tensor


def look(world: World) -> Seen:
    given = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    total = world.sum(given)
    world.barrier()
    return Seen(world.is_main, given, total)


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


def test_a_process_alone_needs_no_process_group():
    values = torch.ones(2)
    assert torch.equal(ALONE.sum(values), values) and ALONE.sum(values) is not values
    ALONE.barrier()


def test_a_failing_rank_names_itself_and_ends_the_others():
    with pytest.raises(Exception, match="rank 1 has had enough"):
        run_ranks(fail_on_the_second, 2)
