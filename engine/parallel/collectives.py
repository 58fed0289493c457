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
    """Asynchronous `gather_rows`; call the returned handle to wait.

    Where all ranks bring equally many rows nothing is padded or copied: they arrive in the result.
    """
    if group.size == 1:
        return lambda: local
    assert local.shape[dim] == counts[group.rank], f"rank {group.rank} brings {local.shape[dim]} rows, not {counts[group.rank]}"
    longest = max(counts)
    rows = local.movedim(dim, 0)
    sent = rows.contiguous() if len(rows) == longest else _padded([rows], longest)
    received = rows.new_empty(group.size * longest, *rows.shape[1:])
    work = distributed.all_gather_into_tensor(received, sent, group=group.process_group, async_op=True)

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
    """Asynchronous `sum_rows`; call the returned handle to wait.

    Where all ranks get equally many rows nothing is padded or copied, as in `start_gathering`.
    """
    if group.size == 1:
        return lambda: partial
    longest = max(counts)
    rows = partial.movedim(dim, 0)
    is_even = min(counts) == longest
    sent = rows.contiguous() if is_even else _padded(rows.split(list(counts)), longest)
    received = sent.new_empty(longest, *sent.shape[1:])
    work = distributed.reduce_scatter_tensor(received, sent, group=group.process_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return received[: counts[group.rank]].movedim(0, dim)

    return finish


def _padded(parts: Sequence[Tensor], count: int) -> Tensor:
    """Return parts one after the other, each in `count` rows, filled up with zeros."""
    padded = parts[0].new_zeros(len(parts), count, *parts[0].shape[1:])
    for place, part in enumerate(parts):
        padded[place, : len(part)] = part
    return padded.flatten(0, 1)


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


def exchange_counts(counts: Tensor, group: Group) -> Tensor:
    """Exchange what each rank tells every other one: row r of [R, ...] goes to rank r, row r of the result came from it."""
    received = torch.empty_like(counts)
    distributed.all_to_all_single(received, counts, group=group.process_group)
    return received


def start_exchanging(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Finish:
    """Start to exchange rows sorted by the rank they go to; the returned handle gives those of all ranks, sorted by rank.

    sent, received: rows by rank.
    """
    rows = rows.contiguous()
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    splits = list(received), list(sent)
    work = distributed.all_to_all_single(arrived, rows, *splits, group=group.process_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return arrived

    return finish


def gather_objects(own: object, group: Group) -> list:
    """Something small of every rank, by rank; from host to host."""
    everyone: list = [own] * group.size
    if group.size > 1:
        distributed.all_gather_object(everyone, own, group=group.host_group)
    return everyone
