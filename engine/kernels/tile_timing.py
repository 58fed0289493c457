"""Selection of the fastest tiles of ancestor attention on the current GPU. Times are cached."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.kernels import attention_tiles
from engine.kernels.attention_tiles import KERNELS, Tile, TileKey, padded_head_dim
from engine.kernels.interface import AttentionRows
from engine.kernels.kernel_cache import KernelCache

SECTION = "attention_tiles"
# A draft step large enough to fill a GPU: tokens of each document, heads, ancestors per row.
LENGTHS = (1536, 512, 2048)
HEADS = 32
GROUPS = 8
NUM_ANCESTORS = 3
WARM_UP_CALLS = 2
TIMED_CALLS = 5

Timer = Callable[[Callable[[], Any]], float]


def cuda_seconds(work: Callable[[], Any]) -> float:
    """Return the median time of several calls on the current GPU after warm-up, in seconds."""
    for _ in range(WARM_UP_CALLS):
        work()
    times_ms = []
    for _ in range(TIMED_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms) / 1000


def tile_times(
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    cache: KernelCache,
    timer: Timer = cuda_seconds,
) -> dict[TileKey, list[float]]:
    """Return the time of every candidate of each kernel, in seconds, from the cache or by timing.

    Kernels with one candidate are left out. A candidate that raises gets an infinite time. The
    cache stores times instead of choices, so that ranks can add their times and make the same
    choice.
    """
    capability = torch.cuda.get_device_capability(device)
    known = cache.read(SECTION)
    found: dict[TileKey, list[float]] = {}
    for kernel in KERNELS:
        key = TileKey(kernel, padded_head_dim(head_dim), dtype.itemsize)
        tiles = attention_tiles.candidates(key, capability)
        if len(tiles) == 1:
            continue
        label = f"{kernel}, {dtype}, head dim {head_dim}, {[tuple(tile) for tile in tiles]}"
        times_s = _known_times(known.get(label), len(tiles))
        if times_s is None:
            work = _work(kernel, head_dim, dtype, device)
            tried = [_time(work, key, tile, timer) for tile in tiles]
            times_s = [float("inf") if time_s is None else time_s for time_s in tried]
            if None not in tried:
                cache.add(SECTION, {label: [str(time_s) for time_s in times_s]})
        found[key] = times_s
    return found


def choose_tiles(times_s: Mapping[TileKey, Sequence[float]], capability: tuple[int, int]) -> dict[TileKey, Tile]:
    """Return the tile to use for each kernel, from the times of its candidates."""
    chosen = {}
    for key, of_one in times_s.items():
        tiles = attention_tiles.candidates(key, capability)
        chosen[key] = tiles[attention_tiles.fastest(of_one)]
    return chosen


def _known_times(entry: object, count: int) -> list[float] | None:
    """Return the times stored in a cache entry, or None if the entry does not hold `count` times.

    Times are stored as text, since JSON has no infinity.
    """
    if not isinstance(entry, list) or len(entry) != count:
        return None
    try:
        return [float(time_s) for time_s in entry]
    except (TypeError, ValueError):
        return None


def _time(work: Callable[[], Any], key: TileKey, tile: Tile, timer: Timer) -> float | None:
    """Return the time of a candidate in seconds.

    Returns infinity if it fails, and None if the GPU had too little free memory to try it.
    """
    with attention_tiles.trying(key, tile):
        try:
            return timer(work)
        except torch.OutOfMemoryError:
            return None
        except Exception:
            # Compilers and launches raise many types of errors. The tile does not work on this GPU.
            return float("inf")


def _work(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """Return a function that runs the kernel to be timed.

    It may run other kernels as well, which take the same time for every tile.
    """
    from engine.kernels.ancestor_attention import ancestor_attention  # requires Triton

    generator = torch.Generator(device).manual_seed(0)
    num_rows = sum(LENGTHS)

    def draw(num_heads: int) -> Tensor:
        shape = num_rows, num_heads, head_dim
        drawn = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return drawn.requires_grad_()

    position_Q = torch.arange(num_rows, device=device)
    cu_seqlens = torch.tensor((0, *LENGTHS), device=device).cumsum(0).int()
    rows = AttentionRows(position_Q, cu_seqlens, (position_Q,) * NUM_ANCESTORS)
    query_QHE = draw(HEADS)
    key_TGE = draw(GROUPS)
    value_TGE = draw(GROUPS)
    extras = [draw(GROUPS) for _ in range(2 * NUM_ANCESTORS)]
    keys = extras[:NUM_ANCESTORS]
    values = extras[NUM_ANCESTORS:]
    if kernel == "forward":
        return partial(_forward, ancestor_attention, (query_QHE, key_TGE, value_TGE, keys, values, rows))
    output_QHE, _ = ancestor_attention(query_QHE, key_TGE, value_TGE, keys, values, rows)
    return partial(_backward, output_QHE, [query_QHE, key_TGE, value_TGE, *extras], torch.randn_like(output_QHE))


@torch.no_grad()
def _forward(attention: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    attention(*arguments)


def _backward(output_QHE: Tensor, leaves: list[Tensor], grad_QHE: Tensor) -> None:
    torch.autograd.grad(output_QHE, leaves, grad_QHE, retain_graph=True)
