"""A target of a few thousand weights with its tokenizer and chat template, and conversations it can read; all from seeds."""

import atexit
import gc
import os
import sys
import tempfile
from pathlib import Path

gc.disable()  # until the tests are collected: the modules and items that are made until then live on

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined, so before Transformers imports Triton

# Commands that the tests start keep tokenised conversations here, not in the user's cache; modules copy the environment early.
CACHE = tempfile.TemporaryDirectory(prefix="draftspeed-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name

# Of the many processes that the tests start, the first compiles what it imports, and the others read that.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

torch.set_num_threads(1)  # tests run side by side, on tensors so small that threads only wait for each other

from engine.host.processes import collect_garbage_rarely
from tests import fast_interpreter
from tests.paths import PATHS, ComputePath
from tests.tiny_target import TinyCorpus, write_corpus, write_target

if not torch.cuda.is_available():
    fast_interpreter.install()


# Files that take longest, longest first; else a worker could begin one of them when the other has nothing left to do.
SLOWEST = (
    "kernels/test_compile_only.py",
    "test_trainer.py",
    "launcher/test_slurm.py",
    "launcher/test_capture_hidden_states.py",
    "evaluation/test_replay.py",
    "runtime/test_job_watch.py",
    "parallel/test_plan.py",
    "data/test_tokenised.py",
    "parallel/test_zero.py",
    "runtime/test_training_schedule.py",
    "test_golden.py",
    "runtime/test_checkpoint.py",
    "runtime/test_faults.py",
    "evaluation/test_sampling.py",
    "test_plugins.py",
    "launcher/test_cli.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep pytest-xdist from sorting files by their number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from visiting what was imported, millions of objects, again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()
    collect_garbage_rarely()
    atexit.register(gc.unfreeze)  # else nanobind prints what it misses at the end


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> ComputePath:
    """One way to compute a training-time test; on a CPU plain PyTorch takes flash attention's place."""
    chosen = PATHS[request.param]
    if chosen.needs_gpu and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: Triton cannot interpret liger-kernel's norms")
    if chosen.needs_triton or chosen.needs_gpu:
        pytest.importorskip("triton", reason="Triton is not installed")
        from engine.kernels import flash
        from tests.kernels.plain_flash import PLAIN

        monkeypatch.setattr(flash, "available_flash", lambda: PLAIN)
    return chosen


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory) -> Path:
    """A Hugging Face folder with a target of a few thousand weights."""
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> TinyCorpus:
    """Forty conversations to train on and four held out."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
