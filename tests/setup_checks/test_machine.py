"""Machines that are too small, or differ, are found and named."""

import pytest

from engine.host.units import GIB, MIB
from engine.setup_checks.machine import cores_of, has_devices, judge_machines
from tests.setup_facts import GPU, make_ranks, with_machine


def worse(ranks) -> dict[str, str]:
    findings = [finding for finding in judge_machines(ranks) if finding.status != "ok"]
    assert all(finding.fix for finding in findings)
    return {finding.name: f"{finding.status} {finding.text}" for finding in findings}


def test_equal_nodes_with_gpus_are_ready():
    assert not worse(make_ranks()) and has_devices(make_ranks())


def test_a_machine_without_gpus_is_ready_too():
    ranks = make_ranks(num_nodes=1, local_size=2, num_gpus=0, gpu=None, cores=(0, 1), free_memory_bytes=6 * GIB)
    assert not worse(ranks) and has_devices(ranks)


@pytest.mark.parametrize(
    ("changed", "name", "found"),
    [
        ({"gpu": None, "num_gpus": 1}, "GPUs", "problem node1 (rank 6) have no GPU of their own: 4 ranks on the node see 1"),
        (
            {"gpu": GPU.__class__(GPU.name, "gpu-4", GPU.total_bytes, GPU.free_bytes)},
            "GPUs",
            "problem several of node1 (ranks 4, 6)",
        ),
        (
            {"gpu": GPU.__class__("NVIDIA A100", "a", GPU.total_bytes, GPU.free_bytes)},
            "GPU kind",
            "NVIDIA A100 on node1 (rank 6)",
        ),
        ({"gpu": GPU.__class__(GPU.name, "a", 80 * GIB, 20 * GIB)}, "GPU memory", "problem 20 GiB of 80 GiB free on node1"),
        ({"gpu": GPU.__class__(GPU.name, "a", 80 * GIB, 60 * GIB)}, "GPU memory", "warning 60 GiB of 80 GiB free on node1"),
        (
            {"free_memory_bytes": 2 * GIB},
            "host memory",
            "problem 2 GiB of 512 GiB free, 512 MiB per rank, on node1 (rank 6)",
        ),
        ({"free_memory_bytes": 8 * GIB}, "host memory", "warning"),
        ({"free_shm_bytes": 64 * MIB}, "/dev/shm", "problem 64 MiB of 256 GiB free on node1 (rank 6); NCCL needs"),
        ({"free_shm_bytes": 512 * MIB}, "/dev/shm", "warning 512 MiB"),
        ({"shm_bytes": None, "free_shm_bytes": None}, "/dev/shm", "problem does not exist on node1 (rank 6)"),
        ({"open_files": 1024}, "open files", "warning at most 1,024 on node1 (rank 6)"),
        ({"has_infiniband": True, "locked_bytes": 64 << 10}, "locked memory", "problem at most 64 KiB on node1 (rank 6)"),
        ({"cpu_quota": 2.0}, "CPU cores", "warning 0.5 per rank on node1 (rank 6)"),
    ],
)
def test_a_rank_that_lacks_something_is_named(changed, name, found):
    all_found = worse(with_machine(make_ranks(), 6, **changed))
    assert list(all_found) == [name] and found in all_found[name]
    assert ("node1" in all_found[name]) and ("node0" not in all_found[name] or name == "GPU kind")


def test_a_job_whose_ranks_lack_gpus_cannot_go_on():
    assert not has_devices(with_machine(make_ranks(), 6, gpu=None))


def test_locked_memory_matters_only_with_infiniband():
    assert not worse(make_ranks(locked_bytes=64 << 10))


def test_ranks_share_the_cores_on_which_they_may_all_run():
    assert set(cores_of(make_ranks()).values()) == {8.0}
    bound = with_machine(make_ranks(num_nodes=1, local_size=2, cores=(0, 1)), 1, cores=(2, 3, 4))
    assert cores_of(bound) == {0: 2.0, 1: 3.0}
