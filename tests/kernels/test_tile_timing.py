"""Tiles are timed once per machine, kept, and chosen alike by all ranks; the clock is a stand-in."""

import pytest
import torch

from engine.kernels import Kernels, attention_tiles, tile_timing
from engine.kernels.attention_tiles import Tile, TileKey, candidates, tile_of
from engine.kernels.kernel_cache import KernelCache
from engine.kernels.self_check import SelfCheck

ancestor_attention = pytest.importorskip(
    "engine.kernels.ancestor_attention", reason="Triton is not installed"
).ancestor_attention

HOPPER = (9, 0)
CPU = torch.device("cpu")
BF16 = torch.bfloat16
KEYS = {kernel: TileKey(kernel, 128, 2) for kernel in attention_tiles.KERNELS}


class Clock:
    """Times by the tile in use; every other tile takes a second. Counts its calls."""

    def __init__(self, times_s: dict[tuple[str, Tile], float]) -> None:
        self.times_s = times_s
        self.calls = 0

    def __call__(self, kernel: str) -> float:
        self.calls += 1
        time_s = self.times_s.get((kernel, tile_of(*KEYS[kernel])), 1.0)
        if time_s < 0:
            raise RuntimeError("out of resource: shared memory")
        return time_s


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    """A GPU that is not there: what would be timed is the name of the kernel."""
    monkeypatch.setattr(attention_tiles, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(tile_timing, "_work", lambda kernel, *others: kernel)


def self_check(folder, total=list) -> SelfCheck:
    return SelfCheck(CPU, folder, lambda flags: flags, print, total=total)


def test_the_fastest_tile_of_each_kernel_is_used_and_kept(tmp_path):
    _, second, *_ = candidates(KEYS["forward"], HOPPER)
    *_, last = candidates(KEYS["keys"], HOPPER)
    broken = candidates(KEYS["rows"], HOPPER)[1]
    times_s = {("forward", second): 0.5, ("keys", last): 0.9, ("rows", broken): -1.0}
    clock = Clock(times_s)
    self_check(tmp_path).choose_tiles(Kernels(ancestor_attention), BF16, 128, clock)
    assert tile_of(*KEYS["forward"]) == second and tile_of(*KEYS["keys"]) == last
    assert tile_of(*KEYS["rows"]) == candidates(KEYS["rows"], HOPPER)[0]
    assert clock.calls == sum(len(candidates(key, HOPPER)) for key in KEYS.values())

    attention_tiles._chosen.clear()
    again = Clock({})
    self_check(tmp_path).choose_tiles(Kernels(ancestor_attention), BF16, 128, again)
    assert again.calls == 0 and tile_of(*KEYS["forward"]) == second


def test_ranks_choose_alike(tmp_path):
    """This rank finds the second tile faster; the sum with another rank's time says otherwise."""
    default, second, *_ = candidates(KEYS["forward"], HOPPER)

    def total(values: list[float]) -> list[float]:
        slow = [5.0 if index == 1 else 1.0 for index in range(len(values))]
        return [own + other for own, other in zip(values, slow, strict=True)]

    clock = Clock({("forward", second): 0.5})
    kernels = Kernels(ancestor_attention)
    self_check(None, total).choose_tiles(kernels, BF16, 128, clock)
    assert tile_of(*KEYS["forward"]) == default


def test_nothing_is_timed_where_there_is_no_choice(tmp_path):
    clock = Clock({})
    self_check(tmp_path).choose_tiles(Kernels(), BF16, 128, clock)
    self_check(tmp_path).choose_tiles(Kernels(ancestor_attention), torch.float32, 128, clock)
    self_check(tmp_path).choose_tiles(Kernels(ancestor_attention), BF16, 256, clock)
    assert clock.calls == 0


def test_a_damaged_entry_is_timed_again(tmp_path):
    cache = KernelCache(tmp_path, CPU)
    expected = tile_timing.tile_times(128, BF16, CPU, cache, Clock({}))
    label = next(iter(cache.read(tile_timing.SECTION)))
    for damaged in (None, ["1.0"], ["a", "b", "c"], {}):
        cache.add(tile_timing.SECTION, {label: damaged})
        clock = Clock({})
        assert tile_timing.tile_times(128, BF16, CPU, cache, clock) == expected
        assert clock.calls == 3


def test_the_work_that_is_timed_runs_the_kernel_with_the_tile(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tile_timing, "LENGTHS", (3, 5))
    monkeypatch.setattr(tile_timing, "HEADS", 2)
    monkeypatch.setattr(tile_timing, "GROUPS", 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = []
    original = attention_tiles.tile_of

    def spied(kernel, *others):
        seen.append(kernel)
        return original(kernel, *others)

    module = pytest.importorskip("engine.kernels.attention_members")
    monkeypatch.setattr(module, "tile_of", spied)
    for kernel in attention_tiles.KERNELS:
        work = tile_timing._work(kernel, 16, torch.float32, device)
        seen.clear()
        work()
        work()  # several times, as a clock does
        assert kernel in seen
