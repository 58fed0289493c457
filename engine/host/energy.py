"""Energy that the hardware uses, in joules, from counters or from readings of the power."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RAPL = Path("/sys/class/powercap")  # Linux's folder of the counters of Intel's and AMD's processors
MOST_EXTRAPOLATED_S = 5.0  # after the last reading
LONGEST_UNREAD_S = 10.0  # after which the energy is unknown


class EnergyMeter:
    """Energy used since the first reading of a counter.

    Between two readings the energy is extrapolated with the last known power, so that intervals
    shorter than the period of the readings get their share. The total never decreases.
    """

    def __init__(self) -> None:
        self._read_at_s = 0.0
        self._counter_j: float | None = None  # at the last reading
        self._joules = 0.0
        self._power_w = 0.0
        self._largest_j = 0.0

    def add(self, now_s: float, counter_j: float | None, power_w: float | None = None) -> None:
        """Add a reading.

        counter_j: joules since any fixed moment; None = the counter could not be read. power_w: now;
        None = unknown, and the mean since the last reading is taken instead.
        """
        if counter_j is None:
            return
        if self._counter_j is not None:
            gained_j = max(0.0, counter_j - self._counter_j)  # a counter may be reset
            self._joules += gained_j
            self._power_w = gained_j / max(1e-6, now_s - self._read_at_s)
        if power_w is not None:
            self._power_w = power_w
        self._counter_j = counter_j
        self._read_at_s = now_s

    def total(self, now_s: float) -> float | None:
        """Return the joules used until now; None = the counter was not read in the last `LONGEST_UNREAD_S`."""
        if self._counter_j is None or now_s - self._read_at_s > LONGEST_UNREAD_S:
            return None
        since_s = min(MOST_EXTRAPOLATED_S, max(0.0, now_s - self._read_at_s))
        self._largest_j = max(self._largest_j, self._joules + self._power_w * since_s)
        return self._largest_j


class PowerIntegral:
    """Energy of a device that has no counter, integrated over readings of its power."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None  # time and power
        self._joules = 0.0

    def add(self, now_s: float, power_w: float | None) -> float | None:
        """Add a reading and return the joules since the first one. None = the power is unknown."""
        if power_w is None:
            return None
        if self._last is not None:
            last_s, last_w = self._last
            self._joules += (power_w + last_w) / 2 * (now_s - last_s)
        self._last = now_s, power_w
        return self._joules


@dataclass
class _Domain:
    """A counter of a processor's energy, which starts again at 0 after `range_uj` microjoules."""

    path: Path
    range_uj: int
    last_uj: int
    counted_uj: int = 0

    def read(self) -> int:
        """Return the microjoules since the counter was opened."""
        value_uj = int(self.path.read_text())
        self.counted_uj += (value_uj - self.last_uj) % self.range_uj
        self.last_uj = value_uj
        return self.counted_uj


class CpuEnergy:
    """Energy of the machine's processors and, where it is counted, of its memory (RAPL)."""

    def __init__(self, domains: Sequence[_Domain]) -> None:
        self._domains = domains

    @classmethod
    def find(cls, root: Path = RAPL) -> "CpuEnergy | None":
        """Return the machine's counters, or None if there are none or this user may not read them."""
        domains = []
        for folder in sorted(root.glob("intel-rapl:*")):
            try:
                name = (folder / "name").read_text().strip()
                # Domains of cores and of graphics are parts of a package, and psys contains the packages.
                if not name.startswith(("package", "dram")):
                    continue
                counter = folder / "energy_uj"
                range_uj = int((folder / "max_energy_range_uj").read_text())
                domains.append(_Domain(counter, range_uj + 1, int(counter.read_text())))
            except (OSError, ValueError):
                return None
        return cls(domains) if domains else None

    def joules(self) -> float | None:
        """Return the joules since the counters were opened; None if they cannot be read."""
        try:
            return sum(domain.read() for domain in self._domains) / 1e6
        except (OSError, ValueError):
            return None
