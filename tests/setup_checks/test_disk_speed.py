"""The disk's speed is measured without leaving a file, and a folder that cannot be written is a finding."""

import os
import subprocess
from pathlib import Path

import pytest

from engine.setup_checks.disk_speed import BLOCK_BYTES, DiskFacts, existing, judge_disk, measure_disk

GOOD = DiskFacts("node0", free_bytes=1 << 40, write_mb_per_s=900.0, read_mb_per_s=2000.0)
FOLDER = Path("/runs")


def worse(*nodes: DiskFacts, is_shared: bool | None = None) -> list[tuple[str, str, str]]:
    findings = judge_disk(nodes, FOLDER, is_shared)
    return [(finding.name, finding.status, finding.text) for finding in findings if finding.status != "ok"]


def test_a_fast_shared_disk_is_ready():
    assert not worse(GOOD, GOOD, is_shared=True) and not worse(GOOD)


@pytest.mark.parametrize(
    ("node", "name", "status", "text"),
    [
        (DiskFacts("node1", 1 << 40, 20.0, 3000.0), "disk speed", "warning", "writes 20 MB/s, reads 3,000 MB/s on node1"),
        (DiskFacts("node1", 1 << 29, 900.0, 900.0), "disk space", "problem", "512 MiB free"),
        (DiskFacts("node1", 10 << 30, 900.0, 900.0), "disk space", "warning", "10 GiB free"),
        (DiskFacts("node1", error="Read-only file system"), "disk", "problem", "/runs cannot be written on node1: Read-only"),
    ],
)
def test_the_worst_node_is_named(node, name, status, text):
    ((found_name, found_status, found),) = worse(GOOD, node)
    assert (found_name, found_status) == (name, status) and text in found and "node1" in found


def test_nodes_without_a_shared_folder_are_warned():
    ((name, status, _),) = worse(GOOD, GOOD, is_shared=False)
    assert (name, status) == ("shared folder", "warning")


def test_nothing_is_left_behind(tmp_path):
    folder = tmp_path / "a" / "b"
    with existing(folder):
        facts = measure_disk(folder, "here", most_bytes=BLOCK_BYTES)
        assert not list(folder.iterdir())
    assert facts.error == "" and facts.write_mb_per_s > 0 and facts.read_mb_per_s > 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_exist_is_an_error_of_the_facts(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with existing(file / "folder"):
        facts = measure_disk(file / "folder", "here")
    assert "Not a directory" in facts.error and not facts.is_full


def test_a_full_disk_is_a_problem(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("to mount a small disk needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        facts = measure_disk(tmp_path, "here")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    (finding,) = judge_disk([facts], tmp_path, None)
    assert (
        facts.is_full and finding.status == "problem" and "No space left" in finding.text and "Free some space" in finding.fix
    )
