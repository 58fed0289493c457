"""Figures of an NVIDIA GPU, read through NVIDIA's management library (the package nvidia-ml-py).

A figure that the driver does not give, or that this user may not read, is missing; nothing here raises
an error once a GPU is open.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

ALL_LINKS = 2**32 - 1  # scope of a field that is summed over all NVLinks
KIB = 1024
GPU_IDLE = 0x1
SETTINGS = 0x2 | 0x100  # clocks that a user or a display has set
POWER_LIMIT = "power limit"
# Bits of the reasons why a GPU's clock is below its maximum, as NVIDIA's header names them.
SLOWDOWNS = {
    0x4: POWER_LIMIT,
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature",
    0x40: "temperature, in hardware",
    0x80: "power brake",
    0x200: "board limit",
    0x400: "reliability",
}
Figures = dict[str, float]  # by name; an unknown figure is missing

UTILIZATION = "gpu_utilization"  # share of time in which a kernel ran
MEMORY = "gpu_memory_bytes"
POWER = "gpu_power_w"
TEMPERATURE = "gpu_temperature_c"
CLOCK = "gpu_clock_mhz"
PCIE = "pcie_bytes_per_s"
NVLINK = "nvlink_bytes_per_s"
GPU_FIGURES = (UTILIZATION, MEMORY, POWER, TEMPERATURE, CLOCK, PCIE, NVLINK)


class GpuUnknownError(ValueError):
    """Error for a GPU of which no figures can be read; the message says why."""


class NvmlGpu:
    """A GPU, or a slice of one (MIG).

    max_clock_mhz: None = unknown. missing: names of figures that the first reading did not have.
    """

    def __init__(self, nvml: Any, device: Any, board: Any, is_slice: bool) -> None:
        """Create it.

        nvml: the module `pynvml`. device: handle of the GPU or the slice. board: handle of the GPU.
        is_slice: whether others may use the rest of the board. Its utilisation, power and traffic are
        then not this process's, and remain unknown.
        """
        self._nvml = nvml
        self._device = device
        self._board = board
        self._is_slice = is_slice
        self._linked: tuple[float, float] | None = None  # time and bytes of the last reading
        self.max_clock_mhz: float | None = self._ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(board, nvml.NVML_CLOCK_SM))
        known = self.read()
        self.missing = [name for name in GPU_FIGURES if name not in known and name != NVLINK]
        if self._linked is None:
            self.missing.append(NVLINK)

    @classmethod
    def open(cls, uuid: str) -> "NvmlGpu":
        """Open a GPU or a slice of one. Raises GpuUnknownError if this is not possible.

        uuid: as PyTorch names it, without the prefix of its kind.
        """
        try:
            import pynvml as nvml
        except ImportError as error:
            raise GpuUnknownError("the package nvidia-ml-py is not installed; pip install nvidia-ml-py") from error
        try:
            nvml.nvmlInit()
        except Exception as error:  # of a missing driver, or of another package with the module's name
            raise GpuUnknownError(f"NVIDIA's management library does not start: {_message(error)}") from error
        reasons = []
        for prefix in ("GPU-", "MIG-"):
            try:
                return cls._with_handle(nvml, nvml.nvmlDeviceGetHandleByUUID(prefix + uuid), is_slice=prefix == "MIG-")
            except Exception as error:
                reasons.append(_message(error))
        _shut_down(nvml)
        raise GpuUnknownError(f"NVIDIA's management library does not know GPU {uuid}: {reasons[0]}")

    @classmethod
    def _with_handle(cls, nvml: Any, device: Any, is_slice: bool) -> "NvmlGpu":
        if is_slice:
            return cls(nvml, device, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device), is_slice)
        gpu = cls(nvml, device, device, is_slice)
        # CUDA may name a slice by its board.
        mode = gpu._ask(lambda: nvml.nvmlDeviceGetMigMode(device)[0])
        return cls(nvml, None, device, is_slice=True) if mode == 1 else gpu

    def close(self) -> None:
        _shut_down(self._nvml)

    def _ask(self, read: Callable[[], float | None]) -> float | None:
        """Return a figure, or None if it cannot be read."""
        try:
            return read()
        except Exception:  # old drivers, old packages and missing permissions have many errors, and none may end a run
            return None

    def read(self) -> Figures:
        """Return the known ones of `GPU_FIGURES`. Takes about 40 ms, in which the library measures the traffic."""
        nvml = self._nvml
        device = self._device
        board = self._board
        figures = {
            TEMPERATURE: self._ask(lambda: nvml.nvmlDeviceGetTemperature(board, nvml.NVML_TEMPERATURE_GPU)),
            CLOCK: self._ask(lambda: nvml.nvmlDeviceGetClockInfo(board, nvml.NVML_CLOCK_SM)),
        }
        if device is not None:
            figures[MEMORY] = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(device).used)
        if not self._is_slice:
            figures[UTILIZATION] = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(board).gpu / 100)
            figures[POWER] = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(board) / 1000)
            figures[PCIE] = self._ask(self._pcie_bytes_per_s)
            figures[NVLINK] = self._ask(self._nvlink_bytes_per_s)
        return {name: float(value) for name, value in figures.items() if value is not None}

    def joules(self) -> float | None:
        """Return the energy since the driver was loaded, or None if it is not counted for this process alone."""
        if self._is_slice:
            return None
        return self._ask(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._board) / 1000)

    def slowdowns(self) -> list[str] | None:
        """Return why the clock is below its maximum, other than by idleness or by a setting; None = unknown."""
        bits = self._ask(self._clock_reasons)
        if bits is None:
            return None
        rest = int(bits) & ~(GPU_IDLE | SETTINGS)
        return [SLOWDOWNS.get(1 << place, f"reason {1 << place:#x}") for place in range(rest.bit_length()) if rest >> place & 1]

    def _clock_reasons(self) -> float:
        read = getattr(self._nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        if read is not None:
            with suppress(self._nvml.NVMLError):  # of a driver from before the function was renamed
                return read(self._board)
        return self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._board)

    def _pcie_bytes_per_s(self) -> float:
        nvml = self._nvml
        directions = (nvml.NVML_PCIE_UTIL_TX_BYTES, nvml.NVML_PCIE_UTIL_RX_BYTES)
        return 1000 * sum(nvml.nvmlDeviceGetPcieThroughput(self._board, direction) for direction in directions)

    def _nvlink_bytes_per_s(self) -> float | None:
        """Return the traffic since the last reading; None at the first one."""
        nvml = self._nvml
        fields = (nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX)
        values = nvml.nvmlDeviceGetFieldValues(self._board, [(field, ALL_LINKS) for field in fields])
        now_s = time.monotonic()
        if any(value.nvmlReturn != nvml.NVML_SUCCESS for value in values):
            return None
        num_bytes = KIB * sum(value.value.ullVal for value in values)
        before = self._linked
        self._linked = now_s, num_bytes
        if before is None:
            return None
        return max(0.0, num_bytes - before[1]) / max(1e-6, now_s - before[0])


def _message(error: Exception) -> str:
    return str(error) or type(error).__name__


def _shut_down(nvml: Any) -> None:
    with suppress(Exception):  # nothing depends on it
        nvml.nvmlShutdown()
