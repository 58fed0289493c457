"""Joules are those of the counters, whenever and however often they are asked for."""

from pathlib import Path

import pytest

from engine.host.energy import CpuEnergy, EnergyMeter, PowerIntegral


def test_short_intervals_get_their_share_and_all_of_them_the_counter():
    meter = EnergyMeter()
    assert meter.total(0.0) is None
    meter.add(0.0, 7000.0, power_w=100.0)
    totals = [meter.total(0.25 * quarter) for quarter in range(4)]
    assert totals == [0, 25, 50, 75]
    meter.add(1.0, 7090.0, power_w=80.0)  # less than was expected
    assert meter.total(1.0) == 90 and meter.total(1.5) == 130
    meter.add(2.0, 7120.0)
    assert meter.total(2.0) == 130, "it never falls"
    meter.add(3.0, None)
    meter.add(4.0, 7200.0)
    assert meter.total(4.0) == 200, "a reading that failed loses nothing"
    assert meter.total(14.0) == 200 + 5 * 40 and meter.total(14.5) is None, "not for ever, if the thread hangs"
    meter.add(5.0, 10.0)
    assert meter.total(5.0) == 400, "a counter that begins again takes nothing away"


def test_power_is_integrated_where_there_is_no_counter():
    integral = PowerIntegral()
    assert [integral.add(*reading) for reading in ((0.0, 100.0), (1.0, 200.0), (2.0, None), (3.0, 300.0))] == [
        0,
        150,
        None,
        650,
    ]


def write_domain(root: Path, number: str, name: str, value: int) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text("999999\n")
    (folder / "energy_uj").write_text(f"{value}\n")
    return folder / "energy_uj"


def test_processors_and_memory_are_counted_once_and_past_the_counters_end(tmp_path):
    assert CpuEnergy.find(tmp_path) is None
    package = write_domain(tmp_path, "0", "package-0", 900_000)
    write_domain(tmp_path, "0:0", "core", 1).write_text("500000")
    memory = write_domain(tmp_path, "0:1", "dram", 0)
    write_domain(tmp_path, "1", "psys", 0).write_text("700000")
    counters = CpuEnergy.find(tmp_path)
    memory.write_text("250000")
    package.write_text("100000")
    assert counters.joules() == pytest.approx(0.2 + 0.25)
    package.write_text("350000")
    assert counters.joules() == pytest.approx(0.45 + 0.25)
    package.unlink()
    assert counters.joules() is None
    assert CpuEnergy.find(tmp_path) is None
