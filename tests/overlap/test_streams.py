from dataclasses import dataclass

import pytest
import torch

from engine.overlap.streams import ALIGNMENT, Buffer, Ring, map_tensors, size_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    states: torch.Tensor
    parts: list[torch.Tensor]
    name: str = "work"


def work(rows: int) -> Work:
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, 5, generator=generator)
    transposed = torch.randn(4, rows, generator=generator).to(torch.bfloat16).T
    flags = torch.rand(rows, generator=generator) > 0.5
    return Work(states, [transposed, flags, torch.tensor(rows), torch.empty(0, dtype=torch.int64)])


def tensors(value: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_a_buffer_holds_equal_tensors_in_one_block(rows):
    original = work(rows)
    buffer = Buffer()
    copied = buffer.fill((original, 3), CPU)
    assert copied[1] == 3 and copied[0].name == "work"
    assert buffer.num_bytes == size_of(original)
    for before, after in zip(tensors(original), tensors(copied), strict=True):
        assert torch.equal(before, after) and before.dtype == after.dtype and before.shape == after.shape
        if after.numel():
            assert after.untyped_storage().data_ptr() == buffer._block.untyped_storage().data_ptr()
            assert (after.data_ptr() - buffer._block.data_ptr()) % ALIGNMENT == 0


def test_a_buffer_allocates_only_to_grow():
    buffer = Buffer()
    buffer.fill(work(300), CPU)
    block = buffer._block.data_ptr()
    for rows in (7, 300, 1):
        buffer.fill(work(rows), CPU)
        assert buffer._block.data_ptr() == block
    before = buffer.num_bytes
    buffer.fill(work(900), CPU)
    assert buffer.num_bytes > before


def test_tensors_on_other_devices_are_kept():
    elsewhere = torch.empty(3, device="meta")
    here = torch.ones(2)
    kept, copied = Buffer().fill([elsewhere, here], CPU)
    assert kept is elsewhere and copied is not here


def test_a_ring_has_as_many_buffers_as_were_in_use_at_once():
    ring = Ring()
    for _ in range(50):
        held = [ring.take(10)[0] for _ in range(3)]
        assert len({id(buffer) for buffer in held}) == 3
        for buffer in held:
            ring.give_back(buffer, None)
    assert len(ring.buffers) == 3


def test_buffers_grow_only_where_none_is_large_enough_and_stay_within_their_limit():
    ring = Ring(limit=1000)
    small = [ring.take(100)[0] for _ in range(8)]
    for buffer in small:
        buffer.block(100, CPU)
        ring.give_back(buffer, None)
    grown, dropped = ring.take(900)
    grown.block(900, CPU)
    assert len(dropped) == 6 and sum(buffer.num_bytes for buffer in ring.buffers) == 1000
    ring.give_back(grown, None)
    again, dropped = ring.take(50)
    assert again.num_bytes == 100 and not dropped, "the smallest that is large enough"
