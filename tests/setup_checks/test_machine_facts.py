"""Facts about the machine that runs the tests, which a container may limit."""

from types import SimpleNamespace

import psutil
import pytest

from engine.host.memory_limit import MemoryLimit
from engine.setup_checks import machine_facts
from engine.setup_checks.machine_facts import MachineFacts


@pytest.mark.parametrize(
    ("limit", "total", "free"),
    [
        (None, 1000, 600),
        (MemoryLimit(500, 450), 500, 50),
        (MemoryLimit(900, 100), 900, 600),
        (MemoryLimit(2000, 500), 1000, 600),
        (MemoryLimit(500, 510), 500, 0),
    ],
)
def test_free_memory_is_what_both_the_machine_and_the_limit_leave(monkeypatch, limit, total, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=600))
    monkeypatch.setattr(machine_facts, "read_memory_limit", lambda: limit)
    own = MachineFacts.own(local_rank=0)
    assert (own.memory_bytes, own.free_memory_bytes) == (total, free)


def test_the_processors_of_a_container_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_facts, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert MachineFacts.own(local_rank=0).cpu_quota == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert MachineFacts.own(local_rank=0).cpu_quota is None
