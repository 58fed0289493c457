"""An installed package trains without the repository: the wheel holds commands, recipes, DeepSpeed's files and the target."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import engine
from launcher.command import shipped_ds_config, shipped_recipe

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = ("engine", "launcher", "ds_configs", "setup.py", "pyproject.toml")


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment that holds the built wheel; what DeepSpeed and others need is taken from this one."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], folder)
    assert built.returncode == 0, built.stderr
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    (wheel,) = folder.glob("draftspeed-*.whl")
    python = environment / "bin" / "python"
    done = run([*pip, "--python", str(python), "install", "-q", "--no-deps", str(wheel)], folder)
    assert done.returncode == 0, done.stderr
    packages = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).stdout.strip()
    # The path file is read, but not the one in that folder that makes the repository importable.
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin"


def test_a_wheel_trains_and_exports_a_draft(installed, tmp_path, tiny_corpus):
    """For the embedded target; the embedded corpus is made of the Python that runs, and not of files of the wheel."""
    options = ["max_steps=2", "evaluation.num_prompts=0", "data.max_tokens=256", f"output_dir={tmp_path / 'run'}"]
    options += [f"data.train={tiny_corpus.train}", f"data.held_out={tiny_corpus.held_out}", "draft.vocab_size=64"]
    trained = run([str(installed / "draftspeed"), "train", "--ds_config", "zero0", *options], tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "draft" / "model.safetensors").is_file()
    where = run([str(installed / "python"), "-c", "import engine; print(engine.__file__)"], tmp_path).stdout
    assert str(installed.parent) in where
    shipped = {path.name for path in (Path(where.strip()).parents[1] / "launcher" / "kubernetes").iterdir()}
    assert shipped >= {"train.yaml", "start_ranks.sh"}


def test_the_command_lists_what_it_can_run(installed, tmp_path):
    assert run([str(installed / "draftspeed"), "--version"], tmp_path).stdout == f"draftspeed {engine.__version__}\n"
    usage = run([str(installed / "draftspeed")], tmp_path).stdout
    assert "  train " in usage and "  measure " in usage
    wrong = run([str(installed / "draftspeed"), "trian"], tmp_path)
    assert wrong.returncode != 0 and "did you mean 'train'?" in wrong.stderr


def test_shipped_files_are_found_by_name_and_own_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_recipe("llama3.1-8b") == ROOT / "launcher" / "recipes" / "llama3.1-8b.yaml"
    assert shipped_ds_config("ds_configs/zero3.json") == ROOT / "ds_configs" / "zero3.json"
    assert shipped_ds_config("other/zero3.json") == Path("other/zero3.json")
    Path("zero3.json").write_text("{}")
    assert shipped_ds_config("zero3.json") == Path("zero3.json")
