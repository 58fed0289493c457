"""Samples of the hardware are summed up by interval, and nothing that cannot be read ends a run."""

import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from engine.host import hardware
from engine.host.hardware import (
    HOST_MEMORY,
    HOST_MEMORY_SHARE,
    OWN_CPUS,
    SWAP,
    THREAD,
    HardwareReading,
    HardwareSampler,
    HostReader,
)
from engine.host.memory_limit import MemoryLimit
from engine.host.nvml_gpu import CLOCK, POWER, NvmlGpu
from tests.host.test_nvml_gpu import UUIDS, FakeNvml

GPU = torch.device("cuda", 0)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(hardware, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def nvml(monkeypatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_an_interval_has_mean_maximum_and_sum_of_its_samples(clock, nvml):
    sampler = HardwareSampler(NvmlGpu.open(UUIDS[0]))
    sampler.take()
    for power_w, bits in ((100.0, 0x4), (200.0, 0x4), (600.0, 0x1)):
        clock[0] += 1
        nvml.power_w, nvml.bits = power_w, bits
        nvml.joules += power_w
        sampler._sample()
    reading = sampler.take()
    assert reading.mean[POWER] == 300 and reading.maximum[POWER] == 600 and reading.joules == 900
    assert (reading.num_samples, reading.num_slowed, reading.slowdowns) == (3, 2, {"power limit": 2})
    values = reading.metrics()
    assert values["gpu_power_w"] == 300 and values["gpu_memory_gib"] == 3 and values["gpu_utilization"] == pytest.approx(0.8)
    assert values["pcie_gb_per_s"] == 2.5 and values["cpu_utilization"] is None
    clock[0] += 0.5
    again = sampler.take()
    assert again.mean[POWER] == 600 and again.num_samples == 0 and again.joules == 300, "half a second at the last power"


def test_figures_and_energy_of_a_pause_do_not_count(clock, nvml):
    sampler = HardwareSampler(NvmlGpu.open(UUIDS[0]))
    sampler.take()
    with sampler.pause():
        clock[0] += 1
        nvml.joules += 7000
        nvml.power_w = 0.0
        sampler._sample()
    reading = sampler.take()
    assert reading.joules == 0 and reading.mean[POWER] == 300


def test_energy_that_becomes_unknown_is_not_counted_as_nothing(clock, nvml):
    sampler = HardwareSampler(NvmlGpu.open(UUIDS[0]))
    counter = "nvmlDeviceGetTotalEnergyConsumption"
    nvml.refused.add(counter)
    clock[0] += 11
    nvml.joules += 1000
    sampler._sample()
    assert sampler.take().joules is None
    nvml.refused.remove(counter)
    sampler._sample()
    assert sampler.take_joules() is None, "it holds the energy of an earlier interval"
    clock[0] += 1
    nvml.joules += 300
    sampler._sample()
    assert sampler.take_joules() == 300


@pytest.mark.parametrize("refused", ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"])
def test_energy_needs_a_counter_or_the_power(clock, nvml, refused):
    nvml.refused.add(refused)
    sampler = HardwareSampler(NvmlGpu.open(UUIDS[0]))
    clock[0] += 2
    nvml.joules += 600
    sampler._sample()
    assert sampler.take_joules() == 600
    nvml.refused |= {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"}
    assert HardwareSampler(NvmlGpu.open(UUIDS[0])).take_joules() is None


def test_a_rank_reads_its_own_gpu_and_says_once_what_it_cannot_read(monkeypatch, nvml):
    notes: list[str] = []
    properties = {0: SimpleNamespace(uuid=UUIDS[1])}  # as with CUDA_VISIBLE_DEVICES=1
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device.index])
    with HardwareSampler.open(GPU, 0, notes.append) as sampler:
        assert sampler.take().mean[POWER] == 1300 and not notes
    assert nvml.num_open == 0
    energy = {"nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"}
    nvml.refused |= {"nvmlDeviceGetTemperature", "nvmlDeviceGetPcieThroughput", *energy}
    HardwareSampler.open(GPU, 1, notes.append)
    assert "pcie_gb_per_s" in notes[0] and "joules_per_million_tokens" in notes[0] and "bytes" not in notes[0]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with HardwareSampler.open(GPU, 1, notes.append) as sampler:
        assert sampler.take() == HardwareReading()
    properties[0] = SimpleNamespace()
    HardwareSampler.open(GPU, 1, notes.append)
    assert ["gpu_temperature_c" in notes[0], "nvidia-ml-py" in notes[1], "UUID" in notes[2]] == [True] * 3 and len(notes) == 3


def test_only_the_first_rank_of_a_machine_accounts_for_its_processors(monkeypatch, tmp_path, clock):
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    for name, content in (("name", "package-0"), ("max_energy_range_uj", "10000000"), ("energy_uj", "0")):
        (counter.parent / name).write_text(content)
    found = hardware.CpuEnergy.find
    monkeypatch.setattr(hardware.CpuEnergy, "find", lambda: found(tmp_path))
    cpu = torch.device("cpu")
    first, second = (HardwareSampler.open(cpu, local_rank, print) for local_rank in (0, 1))
    clock[0] += 1
    counter.write_text("2000000")
    first._sample()
    assert first.take().joules == pytest.approx(2.0) and second.take() == HardwareReading(joules=0.0)
    counter.unlink()
    assert HardwareSampler.open(cpu, 0, print).take().joules is None


def test_the_thread_samples_the_machine_and_ends(monkeypatch):
    monkeypatch.setattr(hardware, "FIRST_PERIOD_S", 0.12)
    monkeypatch.setattr(hardware, "PERIOD_S", 0.12)
    began = time.monotonic()
    with HardwareSampler.open(torch.device("cpu"), 0, print) as sampler:
        until = time.process_time() + 0.15  # seconds of a processor, however long they take
        while time.process_time() < until or OWN_CPUS not in sampler._latest:
            assert time.monotonic() < began + 60, "the thread does not sample"
        reading = sampler.take()
    assert THREAD not in {thread.name for thread in threading.enumerate()}
    assert 0 < reading.mean["cpu_utilization"] <= 1 and 0 < reading.mean[OWN_CPUS] < 64
    assert 0 < reading.maximum[HOST_MEMORY_SHARE] < 1


def test_swapping_is_a_rate_and_a_system_that_does_not_count_it_has_none(monkeypatch, clock):
    swap = SimpleNamespace(sin=1000, sout=500)
    monkeypatch.setattr(psutil, "swap_memory", lambda: swap)
    reader = HostReader()
    clock[0] += 2
    swap.sin, swap.sout = 4000, 1500
    assert reader.read()[SWAP] == 2000

    def fails() -> None:
        raise OSError

    monkeypatch.setattr(psutil, "swap_memory", fails)
    reader = HostReader()
    clock[0] += 2
    assert SWAP not in reader.read()
    monkeypatch.setattr(psutil, "virtual_memory", fails)
    assert CLOCK not in HardwareSampler(host=reader).take().mean


@pytest.mark.parametrize(
    ("limit", "used", "share"), [(None, 400, 0.4), (MemoryLimit(500, 490), 490, 0.98), (MemoryLimit(5000, 900), 400, 0.4)]
)
def test_the_limit_of_a_job_below_the_memory_of_its_machine_counts(monkeypatch, limit, used, share):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=600))
    monkeypatch.setattr(hardware, "read_memory_limit", lambda: limit)
    figures = HostReader().read()
    assert figures[HOST_MEMORY] == used and figures[HOST_MEMORY_SHARE] == pytest.approx(share)
