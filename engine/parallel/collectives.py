"""Collectives of rows that the ranks of a group hold in different numbers; each falls away in a group of one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed

from engine.parallel.mesh import Group

Finish = Callable[[], Tensor]  # waits for what was started, on a GPU in its stream


def gather_rows(local: Tensor, dim: int, counts: Sequence[int], group: Group) -> Tensor:
    """All ranks' rows, in the order of the ranks: [..., own, ...] -> [..., sum(counts), ...]. counts: rows by rank."""
    return start_gathering(local, dim, counts, group)()


def start_gathering(local: Tensor, dim: int, counts: Sequence[int], group: Group) -> Finish:
    """The same, which goes on until it is finished."""
    if group.size == 1:
        return lambda: local
    assert local.shape[dim] == counts[group.rank], f"rank {group.rank} brings {local.shape[dim]} rows, not {counts[group.rank]}"
    longest, rows = max(counts), local.movedim(dim, 0)
    padded = rows.new_empty(longest, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    received = rows.new_empty(group.size * longest, *rows.shape[1:])
    work = distributed.all_gather_into_tensor(received, padded, group=group.process_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        if min(counts) == longest:
            return received.movedim(0, dim)
        parts = zip(received.split(longest), counts, strict=True)
        return torch.cat([part[:count] for part, count in parts]).movedim(0, dim)

    return finish


def sum_rows(partial: Tensor, dim: int, counts: Sequence[int], group: Group) -> Tensor:
    """The sum of all ranks' partial results, of which each rank gets its own rows: the way back of `gather_rows`."""
    return start_summing(partial, dim, counts, group)()


def start_summing(partial: Tensor, dim: int, counts: Sequence[int], group: Group) -> Finish:
    """The same, which goes on until it is finished."""
    if group.size == 1:
        return lambda: partial
    longest, parts = max(counts), partial.movedim(dim, 0).split(list(counts))
    padded = parts[0].new_zeros(group.size, longest, *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        padded[rank, : part.shape[0]] = part
    received = torch.empty_like(padded[0])
    work = distributed.reduce_scatter_tensor(received, padded.flatten(0, 1), group=group.process_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return received[: counts[group.rank]].movedim(0, dim)

    return finish


def sum_over(values: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' values, on every rank."""
    if group.size > 1:
        values = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(values, group=group.process_group)
    return values


def max_over(values: Tensor, group: Group) -> Tensor:
    """The largest of all ranks' values, element by element, on every rank."""
    if group.size > 1:
        values = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(values, op=distributed.ReduceOp.MAX, group=group.process_group)
    return values


def exchange_counts(counts_R: Tensor, group: Group) -> Tensor:
    """How many rows each rank sends to this one: int64 [R] -> int64 [R]. counts_R: what this one sends to each."""
    received_R = torch.empty_like(counts_R)
    distributed.all_to_all_single(received_R, counts_R, group=group.process_group)
    return received_R


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Rows sorted by the rank they go to -> rows sorted by the rank they came from. sent, received: rows by rank."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    distributed.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent), group=group.process_group)
    return arrived


def gather_objects(own: object, group: Group) -> list:
    """Something small of every rank, by rank; from host to host."""
    everyone: list = [own] * group.size
    if group.size > 1:
        distributed.all_gather_object(everyone, own, group=group.host_group)
    return everyone
