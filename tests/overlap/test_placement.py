from types import SimpleNamespace

import pytest
import torch

from engine.config.strict import ConfigError
from engine.overlap import placement
from engine.overlap.look_ahead import Limits
from engine.overlap.pipeline import Producer, SerialPipeline, ThreadedPipeline, TurnsPipeline
from engine.overlap.placement import MeasuredPlacement, Settings, SwitchingPipeline, check_colocated, open_pipeline
from engine.overlap.step_clock import StepClock
from engine.parallel.mesh import World
from tests.overlap.virtual_time import VirtualTime

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (Settings("serial", Limits(0)), SerialPipeline),
        (Settings("colocated", Limits(1)), ThreadedPipeline),
        (Settings("colocated", Limits(1), has_collectives=True), TurnsPipeline),
    ],
)
def test_each_placement_has_its_pipeline(settings, kind):
    with open_pipeline(Producer(range(2), lambda item: item), StepClock(CPU), settings, CPU) as work:
        assert type(work) is kind and list(work) == [0, 1]


@pytest.mark.parametrize(("version", "is_allowed"), [((2, 25, 1), False), ((2, 26), True), ((2, 28, 9), True)])
def test_ranks_that_share_the_target_need_an_nccl_that_orders_launches(version, is_allowed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "nccl", SimpleNamespace(version=lambda: version))
    for name, ranks, device in [("colocated", 1, GPU), ("colocated", 4, CPU), ("serial", 4, GPU), ("auto", 4, GPU)]:
        check_colocated(name, ranks, device)
    if is_allowed:
        check_colocated("colocated", 4, GPU)
        return
    with pytest.raises(ConfigError, match="4 ranks.*2.26 or newer, and this one is 2.25.1; set it to serial") as refused:
        check_colocated("colocated", 4, GPU)
    assert refused.value.key == "overlap.placement"


def measured_run(
    time: VirtualTime, target_s: float, draft_s: float, colocated_extra_s: float = 0.0
) -> tuple[list[str], list[int]]:
    """Notes of a run, and at every step how far it may look ahead; -1 = it is serial."""
    notes: list[str] = []
    limits: list[int] = []
    clock = StepClock(CPU)
    producer = Producer(range(16), lambda item: time.sleep(target_s) or item)
    ahead = Settings("colocated", Limits(1))
    with SwitchingPipeline(producer, clock, lambda rest: open_pipeline(rest, clock, ahead, CPU)) as work:
        choice = MeasuredPlacement(work, 1, World.alone(), notes.append, placement.PeakMemory(CPU))
        for number in range(16):
            choice.begin_step()
            assert next(work) == number
            state = getattr(work._current, "_state", None)
            limits.append(-1 if state is None else state.limits.batches)
            with work.part("backward"):
                time.sleep(draft_s + colocated_extra_s * (limits[-1] == 1))
            choice.end_step()
            time.sleep(0.05 * (number == 9))  # a checkpoint, which is not part of a step
        assert next(work, None) is None
    return notes, limits


def test_the_faster_placement_is_kept_and_the_log_says_why(monkeypatch):
    half = placement.PHASE_STEPS
    time = VirtualTime(monkeypatch)
    notes, limits = measured_run(time, 0.02, 0.02)
    assert limits == [-1] * half + [1] * (16 - half)
    assert len(notes) == 1 and "overlap: colocated" in notes[0]
    assert "0.04 s serially" in notes[0] and "0.02 s colocated" in notes[0]
    notes, limits = measured_run(time, 0.005, 0.01, colocated_extra_s=0.05)
    assert limits == [-1] * half + [1] * half + [0] * (16 - 2 * half)
    assert "overlap: serial" in notes[0] and "0.015 s serially" in notes[0] and "0.06 s colocated" in notes[0]


def test_without_memory_for_both_sides_it_stays_serial(monkeypatch):
    monkeypatch.setattr(placement.PeakMemory, "missing_bytes", lambda self, num_batches: 3 << 30)
    notes, limits = measured_run(VirtualTime(monkeypatch), 0.001, 0.001)
    assert set(limits) == {-1} and len(notes) == 1
    assert "overlap: serial" in notes[0] and "3.0 GiB more memory" in notes[0]


def test_the_memory_of_both_sides_is_that_of_each_and_of_the_batches_between(monkeypatch):
    """A GPU of 100 bytes that holds 20; the target adds 30 while it runs and leaves 5, the draft's peak is 40."""
    now = {"allocated": 20, "peak": 40}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["peak"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now["allocated"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: now.update(peak=now["allocated"]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 100))

    def prepare(item: int) -> int:
        now.update(peak=50, allocated=25)
        return item

    now["peak"] = 90  # of what came before
    memory = placement.PeakMemory(GPU)
    now["peak"] = 40
    assert memory.measured(prepare)(7) == 7
    assert memory.missing_bytes(2) == 40 + 30 + 2 * 5 - 95
    memory.stop()
    assert memory.missing_bytes(2) == 0
