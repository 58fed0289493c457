"""Tile sizes of Triton's attention kernels: how many members and keys a program processes at a time.

Ancestor attention and the attention of draft blocks have the same inner loops and share their tiles.

Which tile is fastest depends on the architecture: its shared memory, how its tensor cores read
operands, and how many programs share a multiprocessor. Each architecture therefore has a few
candidates per kernel and head dim, all of which compile within its shared memory. The first
candidate is the default. At the first start on a GPU, `tile_timing.py` times all candidates.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

KERNELS = ("forward", "rows", "keys")  # the last two belong to the backward pass
MAX_HEAD_DIM = 256
# Share of the default's time that another tile must save; a smaller gain may be measurement noise.
LEAST_GAIN = 0.03


class Tile(NamedTuple):
    """Tile of one program: members M and keys K (powers of two), and Triton's warps and stages."""

    members: int
    keys: int
    num_warps: int
    num_stages: int


def padded_head_dim(head_dim: int) -> int:
    """Return the head dim as launches and `TileKey` use it: a power of two of at least 16."""
    return 1 << max(head_dim - 1, 15).bit_length()


class TileKey(NamedTuple):
    """The kernel, head dim and precision that a tile belongs to.

    kernel: one of `KERNELS`. head_dim: padded to a power of two. element_size: bytes per element.
    """

    kernel: str
    head_dim: int
    element_size: int


# The largest tiles with accumulators that stay in registers; the ancestors cost the kernel `rows`
# the most registers. These tiles fit every architecture.
DEFAULTS = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
    "rows": {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    "keys": {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 2), 256: Tile(32, 32, 8, 2)},
}

TileTable = dict[str, dict[int, tuple[Tile, ...]]]  # by kernel and head dim
# 99 KiB of shared memory: two small programs share a multiprocessor.
_SMALL: TileTable = {
    "forward": {64: (Tile(64, 64, 4, 3),), 128: (Tile(64, 64, 4, 2), Tile(128, 32, 8, 3))},
    "rows": {64: (Tile(64, 64, 4, 3),), 128: (Tile(64, 32, 4, 2),)},
    "keys": {64: (Tile(64, 64, 4, 3),), 128: (Tile(32, 64, 4, 2),)},
}
# 163 KiB of shared memory; tensor cores read their operands from registers.
_AMPERE: TileTable = {
    "forward": {64: (Tile(128, 128, 8, 3),), 128: (Tile(64, 64, 4, 3), Tile(128, 32, 4, 4))},
    "rows": {64: (Tile(64, 64, 4, 4),), 128: (Tile(64, 64, 4, 3),)},
    "keys": {64: (Tile(64, 64, 4, 4),), 128: (Tile(64, 64, 4, 3),)},
}
# 227 KiB of shared memory; tensor cores read their operands from there.
_LARGE: TileTable = {
    "forward": {64: (Tile(128, 128, 8, 3),), 128: (Tile(128, 128, 8, 2), Tile(64, 64, 4, 3))},
    "rows": {64: (Tile(64, 64, 4, 4),), 128: (Tile(64, 64, 4, 3), Tile(128, 64, 8, 2))},
    "keys": {64: (Tile(64, 64, 4, 4),), 128: (Tile(64, 128, 8, 3), Tile(64, 64, 4, 3))},
}
ALTERNATIVES: dict[str, TileTable] = {
    "sm_80": _AMPERE,
    "sm_86": _SMALL,
    "sm_89": _SMALL,
    "sm_90": _LARGE,
    "sm_100": _LARGE,
    "sm_120": _SMALL,
}

_chosen: dict[TileKey, Tile] = {}


def architecture(capability: tuple[int, int]) -> str:
    """Return the key in `ALTERNATIVES` for a compute capability.

    Unknown architectures get the smallest tiles.
    """
    name = "sm_{}{}".format(*capability)
    if name in ALTERNATIVES:
        return name
    return "sm_100" if capability[0] == 10 else "sm_86"


def candidates(key: TileKey, capability: tuple[int, int]) -> tuple[Tile, ...]:
    """Return the tiles to try, the default first. Raises ValueError for a head dim above 256."""
    default = _default(key)
    if key.element_size == 4:
        return (default,)
    others = ALTERNATIVES[architecture(capability)][key.kernel].get(max(key.head_dim, 64), ())
    return (default, *others)


def _default(key: TileKey) -> Tile:
    if key.head_dim > MAX_HEAD_DIM:
        problem = f"a head dim padded to {key.head_dim} is more than these kernels support"
        raise ValueError(f"{problem}; use one of at most {MAX_HEAD_DIM}")
    if key.element_size == 4:
        # Tensor cores do not multiply fp32, so each thread's share of the operands must fit into
        # its 255 registers.
        return Tile(32, 32, 8, 1) if key.head_dim <= 64 else Tile(16, 16, 8, 1)
    return DEFAULTS[key.kernel][max(key.head_dim, 64)]


def tile_of(kernel: str, head_dim: int, element_size: int) -> Tile:
    """Return the tile in use: the one chosen by timing, or the default.

    head_dim: padded to a power of two. Raises ValueError for a head dim above 256.
    """
    key = TileKey(kernel, head_dim, element_size)
    return _chosen.get(key) or _default(key)


def use_tiles(tiles: Mapping[TileKey, Tile]) -> None:
    """Use these tiles from now on in this process."""
    _chosen.update(tiles)


def tiles_in_use() -> dict[TileKey, Tile]:
    """Return the tiles that were chosen by timing."""
    return dict(_chosen)


@contextmanager
def trying(key: TileKey, tile: Tile) -> Iterator[None]:
    """Use `tile` for one kernel inside the `with` block, then restore the previous tiles."""
    before = tiles_in_use()
    _chosen[key] = tile
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)


def fastest(times_s: Sequence[float]) -> int:
    """Return the index of the tile to use.

    times_s: time of each candidate, the default first; infinite for one that fails.
    The default is kept unless another candidate saves at least `LEAST_GAIN` of its time.
    """
    best = min(range(len(times_s)), key=lambda index: times_s[index])
    saves_enough = times_s[best] <= (1 - LEAST_GAIN) * times_s[0]
    return best if saves_enough else 0
