from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.parallel.collectives import (
    exchange_counts,
    gather_objects,
    gather_rows,
    max_over,
    start_exchanging,
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
        "rows": start_exchanging(rows, counts_R.tolist(), received, group)(),
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
    rows = own_rows(0)
    alone = Group()
    assert gather_rows(rows, -2, (3,), alone) is rows and sum_rows(rows, -2, (3,), alone) is rows
    assert sum_over(rows, alone) is rows and max_over(rows, alone) is rows and gather_objects((1,), alone) == [(1,)]


class Written(TorchDispatchMode):
    """While active, adds up the bytes that operations write, collectives aside, and those that are allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = 0
        self.allocated = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        is_view = isinstance(result, torch.Tensor) and any(
            isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == result.untyped_storage().data_ptr() for x in args
        )
        if name in ("new_empty", "empty"):
            self.allocated += result.nbytes
        elif function.namespace != "c10d" and isinstance(result, torch.Tensor) and (name == "copy_" or not is_view):
            self.copied += result.nbytes
        return result


def gather_and_sum(world) -> dict:
    """Results of even and uneven collectives of the same rows, and the bytes that they copy and allocate."""
    group = TargetMesh.make(world, 4, 1).tp
    found = {}
    for name, counts in (("even", (4, 4, 4, 4)), ("uneven", (4, 3, 4, 4))):
        own = torch.full((1, counts[world.rank], 2), 1.0 + world.rank)
        partial = torch.arange(2.0 * sum(counts)).view(1, -1, 2) * (1 + world.rank)
        with Written() as gathering:
            gathered = gather_rows(own, -2, counts, group)
        with Written() as summing:
            summed = sum_rows(partial, -2, counts, group)
        found[name] = gathered, summed, gathering, summing
        found[f"{name} ids"] = gather_rows(torch.full((3, 1, counts[world.rank]), world.rank), -1, counts, group)
    return {name: keep(value) for name, value in found.items()}


def keep(value: Any) -> Any:
    """What travels between processes."""
    if isinstance(value, torch.Tensor):
        return value
    gathered, summed, gathering, summing = value
    return gathered, summed, (gathering.copied, gathering.allocated), (summing.copied, summing.allocated)


def test_even_collectives_copy_nothing_and_give_what_uneven_ones_give():
    results = run_ranks(gather_and_sum, 4)
    for name, counts in (("even", (4, 4, 4, 4)), ("uneven", (4, 3, 4, 4))):
        total = sum(counts)
        expected = torch.cat([torch.full((1, count, 2), 1.0 + rank) for rank, count in enumerate(counts)], 1)
        ids = torch.cat([torch.full((3, 1, count), rank) for rank, count in enumerate(counts)], -1)
        sums = torch.arange(2.0 * total).view(1, -1, 2) * 10
        for rank, found in enumerate(results):
            gathered, summed, gathering, summing = found[name]
            start = sum(counts[:rank])
            assert torch.equal(gathered, expected) and torch.equal(found[f"{name} ids"], ids)
            assert torch.equal(summed, sums[:, start : start + counts[rank]])
            row_bytes = 2 * 4
            if name == "even":
                assert gathering == (0, total * row_bytes), "rows arrive in the result"
                own_bytes = counts[rank] * row_bytes
                assert summing[1] == own_bytes and summing[0] in (0, own_bytes), "gloo copies its sums itself"
            else:
                assert gathering[0] >= total * row_bytes and summing[0] >= total * row_bytes
