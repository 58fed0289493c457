"""Attention of draft blocks in tiles is that of the reference, gradients included."""

import pytest
import torch

from engine.kernels import anchored_blocks, reference
from tests.kernels.anchored_cases import KINDS, BlockCase, gradients, make_blocks
from tests.pairwise import pairwise

HEADS = {"MHA": (2, 2), "GQA": (6, 2), "MQA": (3, 1)}
TILES = {"one row": 1, "blocks are split": 5, "all rows": 1000}
# A few roundings of sums of tens of numbers near 1.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}


def assert_is_the_reference(case: BlockCase, dtype: torch.dtype) -> None:
    ours = gradients(anchored_blocks.anchored_attention, case, dtype)
    expected = gradients(reference.anchored_attention, case, torch.float64)
    for own, true in zip(ours, expected, strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), true, rtol=0, atol=TOLERANCE[dtype])


@pairwise(kind=KINDS, heads=HEADS, tile=TILES, granule=[1, 4, 32], dtype=TOLERANCE)
def test_tiles_are_the_reference(monkeypatch, kind, heads, tile, granule, dtype):
    monkeypatch.setattr(anchored_blocks, "ROWS_PER_TILE", TILES[tile])
    monkeypatch.setattr(anchored_blocks, "KEY_GRANULE", granule)
    assert_is_the_reference(make_blocks(kind, HEADS[heads]), dtype)


def test_tiles_have_fewer_rows_where_their_scores_would_take_more_memory(monkeypatch):
    case = make_blocks("full")
    num_context, num_own = len(case.leaves[1]), len(case.leaves[3])
    num_heads = case.leaves[0].shape[1]
    assert len(anchored_blocks._tiles(case.rows, num_context, num_heads)) == 1
    monkeypatch.setattr(anchored_blocks, "SCORE_BYTES", 2 * (num_context + num_own) * num_heads * 4)
    tiles = anchored_blocks._tiles(case.rows, num_context, num_heads)
    sizes = [tile.rows.stop - tile.rows.start for tile in tiles]
    assert sum(sizes) == len(case.leaves[0]) and 1 < len(sizes) < sum(sizes)
    assert all(tile.rows.start == before.rows.stop for before, tile in zip(tiles, tiles[1:], strict=False))
    assert_is_the_reference(case, torch.float32)


@pytest.mark.parametrize("kind", ["full", "causal window"])
def test_some_rows_see_the_keys_of_all(monkeypatch, kind):
    monkeypatch.setattr(anchored_blocks, "ROWS_PER_TILE", 4)
    assert_is_the_reference(make_blocks(kind).picked(torch.tensor([0, 1, 5, 9, 16])), torch.float32)


def test_one_row_of_a_block_without_context():
    case = make_blocks(block_size=1, anchors=(0,), starts=(0,), num_context=0)
    assert_is_the_reference(case, torch.float32)


def test_no_rows_leave_keys_without_gradients():
    output_QHE, *grads = gradients(anchored_blocks.anchored_attention, make_blocks().picked(torch.arange(0)), torch.float32)
    assert output_QHE.shape[0] == 0
    assert not any(grad.any() for grad in grads)


def test_no_tile_reads_keys_that_its_rows_do_not_see(monkeypatch):
    monkeypatch.setattr(anchored_blocks, "ROWS_PER_TILE", 3)
    monkeypatch.setattr(anchored_blocks, "KEY_GRANULE", 1)
    case = make_blocks("window")
    _, key_TGE, _, own_key_PGE, _ = case.leaves
    expected = anchored_blocks.anchored_attention(*case.leaves, case.rows)[:3]
    key_TGE[1:] = torch.nan
    own_key_PGE[3:] = torch.nan
    found = anchored_blocks.anchored_attention(*case.leaves, case.rows)[:3]
    assert torch.equal(found, expected)
