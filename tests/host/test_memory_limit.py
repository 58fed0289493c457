"""The limit of a job counts wherever in the tree of control groups it is set."""

from pathlib import Path

import pytest

from engine.host.memory_limit import MemoryLimit, read_memory_limit

JOB, STEP, TASK = "system.slice/slurmstepd.scope/job_7", "step_0", "task_0"
NAMES = {
    2: ("", "memory.max", "memory.current", "inactive_file 200\nactive_file 100\n", "max"),
    1: (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file 200\ntotal_active_file 100\n",
        "9223372036854771712",
    ),
}


class Groups:
    """Made-up files of the kernel. version: of control groups."""

    def __init__(self, folder: Path, version: int) -> None:
        self.root = folder / "groups"
        self.own = folder / "cgroup"
        self.version = version
        self.name_own(f"/{JOB}/{STEP}/{TASK}")

    def name_own(self, path: str) -> None:
        lines = [f"0::{path}"] if self.version == 2 else ["9:cpu,cpuacct:/other", f"4:memory:{path}", "0::/"]
        self.own.write_text("\n".join(lines) + "\n")

    def add(self, path: str, limit: int | None, used: int) -> None:
        top, limit_name, used_name, cached, unlimited = NAMES[self.version]
        folder = self.root / top / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_name).write_text(f"{unlimited if limit is None else limit}\n")
        (folder / used_name).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{cached}")

    def read(self) -> MemoryLimit | None:
        return read_memory_limit(self.root, self.own)


@pytest.fixture(params=[1, 2])
def groups(request, tmp_path) -> Groups:
    return Groups(tmp_path, request.param)


def test_the_limit_of_a_job_is_found_above_the_group_of_its_task(groups):
    groups.add("", None, 99_000)
    groups.add(f"{JOB}/{STEP}/{TASK}", None, 700)
    assert groups.read() is None
    groups.add(JOB, 2000, 900)
    assert groups.read() == MemoryLimit(2000, 600)
    groups.add(f"{JOB}/{STEP}", 2000, 800)
    assert groups.read() == MemoryLimit(2000, 600), "of two groups with one limit, the fuller one counts"
    groups.add(f"{JOB}/{STEP}", 1000, 800)
    assert groups.read() == MemoryLimit(1000, 500)


@pytest.mark.parametrize("path", ["/docker/0123", "/../../other", "/"])
def test_in_a_container_its_own_group_counts(groups, path):
    groups.name_own(path)
    groups.add("", 4000, 100)
    assert groups.read() == MemoryLimit(4000, 0), "more is cached than used"


def test_a_system_without_control_groups_has_no_limit(tmp_path):
    assert read_memory_limit(tmp_path, tmp_path / "cgroup") is None
