"""Figures of a GPU through a library that stands in for NVIDIA's; a machine without a GPU has no other."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from engine.host.nvml_gpu import CLOCK, GPU_FIGURES, MEMORY, NVLINK, PCIE, POWER, TEMPERATURE, GpuUnknownError, NvmlGpu

UUIDS = ("11111111-aaaa", "22222222-bbbb")
SLICE = "33333333-cccc"


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two GPUs, of which the second has a slice.

    power_w, joules, bits, linked_kib: of both GPUs, plus 1000 for the second. refused: functions that fail.
    """

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_SUCCESS = 1, 0, 0
    NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 138, 139

    def __init__(self, *refused: str) -> None:
        self.refused = set(refused)
        self.power_w, self.joules, self.bits, self.linked_kib, self.mig_mode = 300.0, 5000.0, 0, 0, 0
        self.num_open = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "refused"):

            def refuse(*arguments: Any) -> Any:
                raise NVMLError("Insufficient Permissions")

            return refuse
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        handles = {f"GPU-{uuid}": number * 1000 for number, uuid in enumerate(UUIDS)} | {f"MIG-{SLICE}": 7}
        if uuid not in handles:
            raise NVMLError("Not Found")
        return handles[uuid]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, device: int) -> int:
        assert device == 7
        return 1000

    def nvmlDeviceGetMigMode(self, board: int) -> list[int]:
        return [self.mig_mode, self.mig_mode]

    def nvmlDeviceGetMaxClockInfo(self, board: int, kind: int) -> int:
        return 1980

    def nvmlDeviceGetClockInfo(self, board: int, kind: int) -> int:
        return 1410 + board

    def nvmlDeviceGetTemperature(self, board: int, sensor: int) -> int:
        return 60

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(used=(3 + device) << 30)

    def nvmlDeviceGetUtilizationRates(self, board: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=80, memory=10)

    def nvmlDeviceGetPowerUsage(self, board: int) -> int:
        return round(1000 * (self.power_w + board))

    def nvmlDeviceGetTotalEnergyConsumption(self, board: int) -> int:
        return round(1000 * (self.joules + board))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, board: int) -> int:
        return self.bits

    def nvmlDeviceGetPcieThroughput(self, board: int, direction: int) -> int:
        return (2_000_000, 500_000)[direction]  # KB/s

    def nvmlDeviceGetFieldValues(self, board: int, fields: list[tuple[int, int]]) -> list[SimpleNamespace]:
        assert fields == [(138, 2**32 - 1), (139, 2**32 - 1)]
        value = SimpleNamespace(ullVal=self.linked_kib)
        return [SimpleNamespace(nvmlReturn=0, value=value) for _ in fields]


@pytest.fixture
def nvml(monkeypatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_a_gpu_is_found_by_its_uuid_wherever_it_is_among_those_of_the_machine(nvml):
    first, second = (NvmlGpu.open(uuid) for uuid in UUIDS)
    assert (first.read()[POWER], second.read()[POWER]) == (300, 1300)
    assert second.joules() == 6000 and second.max_clock_mhz == 1980 and first.missing == []
    figures = first.read()
    assert set(figures) == set(GPU_FIGURES)
    assert figures[PCIE] == 2.5e9 and figures[MEMORY] == 3 << 30
    first.close()
    second.close()
    assert nvml.num_open == 0


def test_nvlinks_rate_is_the_difference_of_two_readings(nvml, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("engine.host.nvml_gpu.time", SimpleNamespace(monotonic=lambda: now[0]))
    gpu = NvmlGpu.open(UUIDS[0])
    nvml.linked_kib += 5_000_000
    now[0] += 2
    assert gpu.read()[NVLINK] == 2 * 5_000_000 * 1024 / 2, "sent and received"


@pytest.mark.parametrize("mig_mode", [0, 1])
def test_a_slice_has_no_figures_of_the_whole_board_that_others_use_too(nvml, mig_mode):
    nvml.mig_mode = mig_mode
    gpu = NvmlGpu.open(SLICE)
    assert gpu.read() == {TEMPERATURE: 60, CLOCK: 2410, MEMORY: 10 << 30} and gpu.joules() is None
    if mig_mode:  # CUDA has named the board
        gpu = NvmlGpu.open(UUIDS[1])
        assert set(gpu.read()) == {TEMPERATURE, CLOCK} and gpu.joules() is None


def test_a_figure_that_is_refused_is_missing_and_the_others_are_there(nvml):
    nvml.refused |= {"nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues"}
    nvml.refused |= {"nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetMigMode"}
    gpu = NvmlGpu.open(UUIDS[0])
    assert gpu.missing == [POWER, NVLINK] and set(gpu.read()) == set(GPU_FIGURES) - {POWER, NVLINK}
    assert gpu.joules() is gpu.max_clock_mhz is gpu.slowdowns() is None


def test_why_the_clock_is_held_back(nvml):
    gpu = NvmlGpu.open(UUIDS[0])
    found = []
    for bits in (0, 0x1, 0x2 | 0x100, 0x4, 0x40 | 0x1, 0x20 | 0x1000):
        nvml.bits = bits
        found.append(gpu.slowdowns())
    assert found == [[], [], [], ["power limit"], ["temperature, in hardware"], ["temperature", "reason 0x1000"]]
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda board: 0x80  # its name in newer versions
    assert gpu.slowdowns() == ["power brake"]
    nvml.refused.add("nvmlDeviceGetCurrentClocksEventReasons")  # a driver from before that
    assert gpu.slowdowns() == found[-1]


def test_a_gpu_that_cannot_be_read_is_refused_with_the_reason(nvml, monkeypatch):
    with pytest.raises(GpuUnknownError, match="does not know GPU 4444.*Not Found"):
        NvmlGpu.open("4444")
    assert nvml.num_open == 0
    nvml.refused.add("nvmlInit")
    with pytest.raises(GpuUnknownError, match="does not start: Insufficient Permissions"):
        NvmlGpu.open(UUIDS[0])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(GpuUnknownError, match="pip install nvidia-ml-py"):
        NvmlGpu.open(UUIDS[0])
