"""The command through a real process: what it prints, what it leaves behind, and how it ends on what it cannot use."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import launch
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "launcher/prepare_data.py"
COMMAND = [sys.executable, SCRIPT]
OUTPUTS = {"train.jsonl", "held_out.jsonl", "report.json"}


@pytest.fixture
def command(tmp_path):
    """Runs the command without a network; the packages it uses keep what they write below the test's folder."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}

    def run(*arguments):
        return subprocess.run([*COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)

    return run


@pytest.fixture
def write(tmp_path):
    def to_file(name, count, *more, size=1):
        rows = ({"question": f"{name} {index}?", "answer": f"{index} " * size} for index in range(count))
        path = tmp_path / name
        path.write_text("".join([json.dumps(row) + "\n" for row in rows] + list(more)))
        return str(path)

    return to_file


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_files_are_mixed_and_the_next_command_is_named(command, write, tmp_path):
    paths = [write("a.jsonl", 200, "{\n", '{"text": 1}\n'), write("b.jsonl", 300)]
    out = tmp_path / "out"
    options = [f"prepare.output_dir={out}", "prepare.weights=[1, 2]", "prepare.held_out_share=0.1"]
    result = command(f"prepare.sources=[{','.join(paths)}]", *options)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert names(out) == OUTPUTS
    lines = [json.loads(line) for name in ("train.jsonl", "held_out.jsonl") for line in (out / name).open()]
    assert len(lines) == 450 and sum(line["source"] == paths[1] for line in lines) == 300
    assert f"{paths[0]}: 2 unusable: 1 not JSON, 1 unknown columns\n  {paths[0]}:201: not JSON" in result.stdout
    train = f"'data.train=[{out / 'train.jsonl'}]'"
    held_out = f"'data.held_out=[{out / 'held_out.jsonl'}]'"
    assert (
        f"deepspeed launcher/train.py --ds_config ds_configs/zero2.json --recipe RECIPE.yaml {train} {held_out}"
        in result.stdout
    )
    again = command(f"prepare.sources={paths[0]}", *options[:1])
    assert again.returncode == 1
    assert (
        again.stderr == f"prepare_data.py: {out / 'train.jsonl'} exists already; name another prepare.output_dir or delete it\n"
    )


def test_a_recipe_may_hold_the_options(command, write, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"prepare:\n  sources: [{write('a.jsonl', 50)}]\n  output_dir: {tmp_path / 'out'}\n  held_out_share: 0\n")
    result = command("--recipe", str(recipe), "prepare.max_samples=20")
    assert result.returncode == 0, result.stderr
    assert names(tmp_path / "out") == {"train.jsonl", "report.json"} and "data.held_out" not in result.stdout
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 20


def test_named_sets_are_listed(command):
    listed = command("--sources")
    assert listed.returncode == 0
    for name in ("ultrachat", "sharegpt", "perfectblend", "magpie", "opencodeinstruct", "gsm8k"):
        assert re.search(rf"^{name} ", listed.stdout, re.MULTILINE)
    assert "HuggingFaceH4/ultrachat_200k, split train_sft" in listed.stdout and "config main" in listed.stdout
    assert max(map(len, listed.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    "overrides, problem",
    [
        ([], r"prepare\.sources = \[\]: .* --sources lists"),
        (["prepare.source=[a]"], r"did you mean 'prepare\.sources'"),
        (["prepare.sources=[a,b]", "prepare.weights=[1]"], "give one weight per source"),
        (["prepare.sources=ultrachatt"], "did you mean 'ultrachat'"),
        (["prepare.sources={file}", "prepare.output_dir=/proc/x"], "/proc/x"),
        (["prepare.sources={file}", "prepare.output_dir={file}"], "exists|Not a directory"),
    ],
)
def test_what_cannot_be_used_ends_with_one_line(overrides, problem, write, tmp_path):
    file = write("a.jsonl", 9)
    out = tmp_path / "out"
    if not any(text.startswith("prepare.output_dir") for text in overrides):
        overrides = [*overrides, f"prepare.output_dir={out}"]
    result = launch([SCRIPT, *(text.format(file=file) for text in overrides)])
    assert_one_line(result, problem)
    assert not out.exists()


def test_a_set_that_cannot_be_reached_ends_with_one_line(command, tmp_path):
    """In a process of its own: the hub's package reads at its import that there is no network."""
    out = tmp_path / "out"
    result = command("prepare.sources=gsm8k", f"prepare.output_dir={out}")
    assert_one_line(result, "gsm8k: cannot be read: Couldn't reach 'openai/gsm8k' on the Hub")
    assert not out.exists()


def assert_one_line(result, problem):
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("prepare_data.py: ") and re.search(problem, result.stderr), result.stderr


# The command, which waits to be killed when it has read a number of rows.
WAITING = """
import runpy, sys, time
from pathlib import Path

sys.path.insert(0, {root!r})

from engine.conversations.published_sets import Rows

whole = Rows.__iter__

def read(self):
    for index, row in enumerate(whole(self)):
        if index == {num_rows}:
            Path({marker!r}).touch()
            time.sleep(600)
        yield row

Rows.__iter__ = read
runpy.run_path("launcher/prepare_data.py", run_name="__main__")
"""


def test_a_killed_command_leaves_no_half_file_and_runs_again(command, write, tmp_path):
    out = tmp_path / "out"
    source = write("a.jsonl", 4_000, size=100)
    options = [f"prepare.sources={source}", f"prepare.output_dir={out}"]
    marker = tmp_path / "reading"
    waiting = WAITING.format(root=str(ROOT), num_rows=2_000, marker=str(marker))
    job = subprocess.Popen([sys.executable, "-c", waiting, *options], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(marker.exists, 240, lambda: job.poll() is None)
    job.kill()
    assert job.wait() == -signal.SIGKILL
    assert names(out) == {"source_0.jsonl.partial"}
    assert command(*options).returncode == 0 and names(out) == OUTPUTS
    lines = [json.loads(line) for name in ("train.jsonl", "held_out.jsonl") for line in (out / name).open()]
    assert len({line["id"] for line in lines}) == len(lines) == 4_000
