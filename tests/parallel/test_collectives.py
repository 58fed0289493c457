import torch

from engine.parallel.collectives import (
    exchange_counts,
    exchange_rows,
    gather_objects,
    gather_rows,
    max_over,
    sum_over,
    sum_rows,
)
from engine.parallel.mesh import Group, TargetMesh
from tests.distributed import run_ranks

COUNTS = (3, 1, 5, 2)


def own_rows(rank: int) -> torch.Tensor:
    return torch.arange(COUNTS[rank] * 2.0).view(1, -1, 2) + 100 * rank


def collect(world) -> dict:
    group = TargetMesh.make(world, 4, 1).tp
    own = own_rows(world.rank)
    gathered = gather_rows(own, -2, COUNTS, group)
    counts_R = torch.tensor([(world.rank + other) % 3 for other in range(4)])
    received = exchange_counts(counts_R, group).tolist()
    kept = torch.tensor([float(world.rank)])
    sum_over(kept, group), max_over(kept, group)
    rows = torch.repeat_interleave(torch.arange(4.0), counts_R)[:, None] + 10 * world.rank
    return {
        "gathered": gathered,
        "summed": sum_rows(gathered * (world.rank + 1), 1, COUNTS, group),
        "sum": sum_over(torch.tensor([1.0, world.rank]), group),
        "max": max_over(torch.tensor([1.0, -world.rank]), group),
        "kept": kept.item(),
        "received": received,
        "rows": exchange_rows(rows, counts_R.tolist(), received, group),
        "objects": gather_objects((world.rank,) * world.rank, group),
    }


def test_rows_in_different_numbers_are_gathered_summed_and_exchanged():
    everyone = torch.cat([own_rows(rank) for rank in range(4)], dim=1)
    for rank, result in enumerate(run_ranks(collect, 4)):
        assert torch.equal(result["gathered"], everyone)
        assert torch.equal(result["summed"], own_rows(rank) * 10)
        assert result["sum"].tolist() == [4, 6] and result["max"].tolist() == [1, 0]
        assert result["kept"] == rank, "what is summed stays as it was"
        assert result["received"] == [(rank + other) % 3 for other in range(4)]
        assert result["rows"].flatten().tolist() == [10 * other + rank for other in range(4) for _ in range((rank + other) % 3)]
        assert result["objects"] == [(), (1,), (2, 2), (3, 3, 3)]


def test_alone_nothing_is_exchanged():
    rows, alone = own_rows(0), Group()
    assert gather_rows(rows, -2, (3,), alone) is rows and sum_rows(rows, -2, (3,), alone) is rows
    assert sum_over(rows, alone) is rows and max_over(rows, alone) is rows and gather_objects((1,), alone) == [(1,)]
