"""Facts about the machine that runs the tests."""

import os

import torch

from engine.setup_checks import machine_facts
from engine.setup_checks.machine_facts import MachineFacts


def test_own_facts_are_plausible():
    own = MachineFacts.own(local_rank=0)
    assert set(own.cores) == os.sched_getaffinity(0)
    assert 0 < own.free_memory_bytes <= own.memory_bytes
    assert (own.gpu is not None) == torch.cuda.is_available()


def test_the_limit_of_a_container_counts_and_its_cache_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_facts, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{900 << 10}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {400 << 10}\n")
    own = MachineFacts.own(local_rank=0)
    assert (own.memory_bytes, own.free_memory_bytes, own.cpu_quota) == (1 << 20, 524 << 10, 1.5)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    own = MachineFacts.own(local_rank=0)
    assert own.memory_bytes > 1 << 20 and own.cpu_quota is None
