"""Versions that are too old, or differ between ranks, are problems that name the nodes."""

from dataclasses import replace

import pytest

from engine.setup_checks.finding import Finding
from engine.setup_checks.rank_facts import UnreadableRank
from engine.setup_checks.required_packages import Requirement, Requirements
from engine.setup_checks.software import judge_copies, judge_software
from engine.setup_checks.software_facts import source_digest
from tests.setup_facts import SOFTWARE, make_ranks, with_software

REQUIREMENTS = Requirements(
    python=Requirement("python", ">=3.10,<3.14"),
    packages=tuple(Requirement.parse(text) for text in ("torch>=2.8", "deepspeed>=0.19", "transformers>=5.20,<6", "numpy>=2")),
    optional=tuple(Requirement.parse(text) for text in ("triton>=3.3", "liger-kernel>=0.8.5,<0.9", "nvidia-ml-py>=12.535")),
)


def worse(findings: list[Finding]) -> dict[str, Finding]:
    """Findings that are not ok, by name."""
    return {finding.name: finding for finding in findings if finding.status != "ok"}


def everywhere(**changed) -> list:
    return [replace(rank, software=replace(SOFTWARE, **changed)) for rank in make_ranks()]


def without(name: str) -> dict[str, str]:
    return {known: version for known, version in SOFTWARE.versions.items() if known != name}


def test_a_cluster_with_the_same_versions_is_ready():
    assert not worse(judge_software(make_ranks(), REQUIREMENTS))


@pytest.mark.parametrize(
    ("changed", "name", "status"),
    [
        ({"python": "3.9.1"}, "Python", "problem"),
        ({"versions": SOFTWARE.versions | {"torch": "2.7.0"}}, "torch", "problem"),
        ({"nccl": "2.25.1"}, "NCCL", "warning"),
        ({"versions": without("triton")}, "triton", "warning"),
        ({"versions": SOFTWARE.versions | {"liger-kernel": "0.9.0"}}, "liger-kernel", "warning"),
        ({"versions": without("nvidia-ml-py")}, "nvidia-ml-py", "warning"),
        ({"versions": SOFTWARE.versions | {"nvidia-ml-py": "12.1"}}, "nvidia-ml-py", "warning"),
        ({"sees_gpu": False}, "CUDA", "problem"),
        ({"sees_gpu": False, "cuda": None}, "CUDA", "problem"),
        ({"has_apex": True}, "apex", "warning"),
    ],
)
def test_a_fault_of_all_ranks_is_found_once(changed, name, status):
    found = worse(judge_software(everywhere(**changed), REQUIREMENTS))
    assert list(found) == [name] and found[name].status == status and found[name].fix


def test_a_cpu_is_no_fault():
    assert not worse(judge_software(everywhere(sees_gpu=False, driver=None), REQUIREMENTS))
    assert not worse(judge_software(everywhere(sees_gpu=False, hides_gpus=True), REQUIREMENTS))
    assert not worse(judge_software(everywhere(has_apex=True, has_nvidia_apex=True), REQUIREMENTS))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"python": "3.11.2"}, "Python"),
        ({"source": "ffffffffffff"}, "DraftSpeed"),
        ({"versions": SOFTWARE.versions | {"flash-attn": "2.8.3"}}, "flash-attn"),
        ({"versions": SOFTWARE.versions | {"numpy": "2.4.5"}}, "numpy"),
        ({"nccl": "2.27.3"}, "NCCL"),
        ({"driver": "575.1"}, "driver"),
        ({"versions": SOFTWARE.versions | {"nvidia-ml-py": "12.560"}}, "nvidia-ml-py"),
    ],
)
def test_the_node_that_differs_is_named(changed, name):
    finding = worse(judge_software(with_software(make_ranks(), 5, **changed), REQUIREMENTS))[name]
    assert "node1 (rank 5)" in finding.text and "node0 (ranks 0-3), node1 (ranks 4, 6-7)" in finding.text
    assert finding.status == ("warning" if name in ("driver", "nvidia-ml-py") else "problem")


def test_the_source_digest_changes_with_any_file_of_the_engine(tmp_path):
    (tmp_path / "engine").mkdir()
    file = tmp_path / "engine" / "a.py"
    file.write_text("a = 1\n")
    first = source_digest(tmp_path)
    file.write_text("a = 2\n")
    assert source_digest(tmp_path) != first


def test_a_copy_with_other_facts_is_named_with_its_node():
    ranks = make_ranks()
    others = [UnreadableRank(rank, "node1", 1, "0.2.0", "fedcba987654") for rank in (6, 7)]
    (finding,) = judge_copies(ranks[0], others)
    assert finding.status == "problem" and finding.name == "DraftSpeed" and finding.fix
    expected = "0.1.0, source 0123456789ab on node0 (rank 0); 0.2.0, source fedcba987654 on node1 (ranks 6-7)"
    assert expected in finding.text and not judge_copies(ranks[0], [])
