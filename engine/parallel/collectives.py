"""Collectives over rows, of which each rank of a group may hold a different number.

Gathering, summing and taking maxima in a group of one rank does not communicate.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed

from engine.parallel.mesh import Group

# Waits for a collective and returns its result. On a GPU the current stream waits, not the host.
Finish = Callable[[], Tensor]


def gather_rows(local: Tensor, dim: int, counts: Sequence[int], group: Group) -> Tensor:
    """Return all ranks' rows in the order of ranks: [..., local, ...] -> [..., sum(counts), ...].

    counts: number of rows of each rank.
    """
    return start_gathering(local, dim, counts, group)()


def start_gathering(local: Tensor, dim: int, counts: Sequence[int], group: Group) -> Finish:
    """Asynchronous `gather_rows`; call the returned handle to wait.

    If all ranks have the same number of rows, nothing is padded or copied.
    """
    if group.size == 1:
        return lambda: local
    assert local.shape[dim] == counts[group.rank], f"rank {group.rank} has {local.shape[dim]} rows, not {counts[group.rank]}"
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
    """Sum all ranks' partial results and return this rank's rows; the reverse of `gather_rows`."""
    return start_summing(partial, dim, counts, group)()


def start_summing(partial: Tensor, dim: int, counts: Sequence[int], group: Group) -> Finish:
    """Asynchronous `sum_rows`; call the returned handle to wait.

    If all ranks get the same number of rows, nothing is padded or copied.
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
    """Concatenate parts, each padded with zeros to `count` rows."""
    padded = parts[0].new_zeros(len(parts), count, *parts[0].shape[1:])
    for place, part in enumerate(parts):
        padded[place, : len(part)] = part
    return padded.flatten(0, 1)


def sum_over(values: Tensor, group: Group) -> Tensor:
    """Return the sum of all ranks' values on every rank."""
    if group.size > 1:
        values = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(values, group=group.process_group)
    return values


def max_over(values: Tensor, group: Group) -> Tensor:
    """Return the element-wise maximum of all ranks' values on every rank."""
    if group.size > 1:
        values = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(values, op=distributed.ReduceOp.MAX, group=group.process_group)
    return values


def exchange_counts(counts: Tensor, group: Group) -> Tensor:
    """Send row r of [R, ...] to rank r, and return the rows received; row r is from rank r."""
    received = torch.empty_like(counts)
    distributed.all_to_all_single(received, counts, group=group.process_group)
    return received


def start_exchanging(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Finish:
    """Start sending rows, sorted by receiving rank; the returned handle gives the rows received.

    The rows received are sorted by sending rank.
    sent, received: number of rows for and from each rank.
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
    """Return a small object of every rank, by rank; exchanged between hosts, not devices."""
    everyone: list = [own] * group.size
    if group.size > 1:
        distributed.all_gather_object(everyone, own, group=group.host_group)
    return everyone
