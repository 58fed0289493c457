import pytest

from engine.overlap.bridge import Sides, own_world
from engine.parallel.mesh import World

RATIOS = [(1, 1), (1, 3), (3, 1), (2, 2), (2, 4), (3, 2), (4, 6)]


@pytest.mark.parametrize(("num_draft", "num_target"), RATIOS)
def test_every_batch_has_one_producer_and_all_ranks_agree_on_it(num_draft, num_target):
    sides = Sides(num_draft, num_target)
    prepared = {}
    for target_rank in range(num_target):
        for batch in sides.batches_of(target_rank, num_batches=7):
            assert batch not in prepared
            prepared[batch] = num_draft + target_rank
    assert prepared == {(rank, index): sides.producer_of(rank, index) for rank in range(num_draft) for index in range(7)}
    counts = [len(sides.batches_of(rank, 7)) for rank in range(num_target)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("num_draft", "num_target"), RATIOS)
def test_no_rank_ever_waits_for_a_later_batch_first(num_draft, num_target):
    """Batches are numbered in the order in which they are trained on; every rank has its own ones in this order."""
    sides = Sides(num_draft, num_target)
    for target_rank in range(num_target):
        numbers = [index * num_draft + rank for rank, index in sides.batches_of(target_rank, 9)]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [(Sides(1, 1), 0), (Sides(2, 6), 0), (Sides(1, 2, 2), 1), (Sides(2, 2, 2), 0), (Sides(1, 8, 4), 3), (Sides(3, 4, 4), 1)],
)
def test_the_batches_of_a_replica_can_be_admitted_at_once(sides, expected):
    assert sides.least_look_ahead == expected


def test_each_side_is_a_world_of_its_own_on_its_own_devices():
    """Two nodes of four GPUs; three ranks train the draft."""
    sides = Sides(3, 5)
    worlds = [own_world(World(rank, 8, rank % 4, 4), sides) for rank in range(8)]
    assert [world.rank for world in worlds] == [0, 1, 2, 0, 1, 2, 3, 4]
    assert [world.size for world in worlds] == [3, 3, 3, 5, 5, 5, 5, 5]
    assert [world.local_rank for world in worlds] == [0, 1, 2, 0, 0, 1, 2, 3], "each side has a first rank on each node"
    assert [world.first_device + world.local_rank for world in worlds] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert worlds[0].num_nodes == 1
