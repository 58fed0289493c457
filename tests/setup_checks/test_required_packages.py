"""What setup.py asks for is read from it, and compared by release number."""

from pathlib import Path

import pytest

from engine.setup_checks.required_packages import Requirement, Requirements, installed_versions, judge_installed

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


@pytest.mark.parametrize(
    ("needed", "version", "is_allowed"),
    [
        ("torch>=2.8", "2.13.0+cu130", True),
        ("torch>=2.8", "2.8", True),
        ("torch>=2.8", "2.7.1", False),
        ("torch>=2.8", "2.9.0a0+git123", True),
        ("transformers>=5.20,<6", "6.0.0", False),
        ("transformers<6,>=5.20; extra == 'gpu'", "5.23.0", True),
        ("x==1.0", "1", True),
        ("x", "0.0.1", True),
    ],
)
def test_versions_are_compared_by_their_numbers(needed, version, is_allowed):
    assert Requirement.parse(needed).allows(version) == is_allowed


def test_requirements_are_those_of_setup_and_are_met_here():
    requirements = Requirements.read(SETUP)
    names = [needed.name for needed in requirements.packages]
    assert {"torch", "deepspeed", "transformers", "xxhash"} <= set(names) and "pytest" not in names
    assert requirements.python.allows("3.10.2") and not requirements.python.allows("3.14.0")
    assert (
        not requirements.optional_versions("triton").allows("3.2") and requirements.optional_versions("unknown").versions == ""
    )
    versions = installed_versions(names)
    assert not judge_installed(requirements, versions)
    del versions["xxhash"]
    (missing,) = judge_installed(requirements, versions)
    assert missing.name == "xxhash" and missing.status == "problem" and "pip install" in missing.fix
