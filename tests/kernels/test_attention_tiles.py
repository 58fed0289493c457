"""Each architecture has tiles that fit it, and another one than the default must be worth it."""

import pytest

from engine.kernels import attention_tiles
from engine.kernels.attention_tiles import ALTERNATIVES, KERNELS, Tile, TileKey

KEY = TileKey("forward", 128, 2)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.setattr(attention_tiles, "_chosen", {})


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_86"),
        ((13, 0), "sm_86"),
    ],
)
def test_every_gpu_has_a_row_and_unknown_ones_get_the_smallest_tiles(capability, row):
    assert attention_tiles.architecture(capability) == row


def test_the_default_comes_first_and_no_tile_comes_twice():
    for row in ALTERNATIVES:
        capability = divmod(int(row.removeprefix("sm_")), 10)
        for kernel in KERNELS:
            for head_dim in (16, 32, 64, 128, 256):
                key = TileKey(kernel, head_dim, 2)
                tiles = attention_tiles.candidates(key, capability)
                assert tiles[0] == attention_tiles.tile_of(*key)
                assert len(set(tiles)) == len(tiles)
                assert all(size & (size - 1) == 0 for tile in tiles for size in tile[:3])
            in_fp32 = attention_tiles.candidates(TileKey(kernel, 128, 4), capability)
            assert len(in_fp32) == 1


def test_a_chosen_tile_is_taken_for_its_own_kernel_and_head_dim_alone():
    chosen = Tile(32, 32, 4, 2)
    default = attention_tiles.tile_of(*KEY)
    attention_tiles.use_tiles({KEY: chosen})
    assert attention_tiles.tile_of(*KEY) == chosen
    for other in (KEY._replace(kernel="rows"), KEY._replace(head_dim=64), KEY._replace(element_size=4)):
        assert attention_tiles.tile_of(*other) != chosen
    attention_tiles.use_tiles({KEY: default})
    with pytest.raises(RuntimeError), attention_tiles.trying(KEY, chosen):
        assert attention_tiles.tile_of(*KEY) == chosen
        raise RuntimeError
    assert attention_tiles.tile_of(*KEY) == default


@pytest.mark.parametrize(
    ("times_s", "expected"),
    [
        ([1.0], 0),
        ([1.0, 0.98, 1.2], 0),  # two percent may be noise
        ([1.0, 0.9, 0.8], 2),
        ([1.0, float("inf")], 0),
        ([float("inf"), 2.0], 1),
        ([float("inf"), float("inf")], 0),
    ],
)
def test_another_tile_must_save_time_that_is_no_noise(times_s, expected):
    assert attention_tiles.fastest(times_s) == expected
