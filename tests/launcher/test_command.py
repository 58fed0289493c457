"""What the launcher's commands do before anything heavy is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_allocator(monkeypatch) -> None:
    for name in command.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_allocator_may_grow_its_segments_before_torch_is_imported(no_allocator):
    script = (
        "import os, sys; import launcher.train, launcher.capture_hidden_states; launcher.train.join_environment();"
        "print('torch' in sys.modules, os.environ['PYTORCH_CUDA_ALLOC_CONF'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "expandable_segments:True"]


@pytest.mark.parametrize("name", command.ALLOCATOR_VARIABLES)
def test_an_allocator_that_the_user_configured_stays_as_it_is(no_allocator, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    command.set_allocator()
    assert {key: os.environ.get(key) for key in command.ALLOCATOR_VARIABLES if key in os.environ} == {
        name: "max_split_size_mb:128"
    }
