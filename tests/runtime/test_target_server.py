"""Runs whose target is on ranks of its own, through the real launcher: equal to serial ones, and ended if a rank ends."""

import json
import time
from pathlib import Path

import pytest

from tests.distributed import launch
from tests.runtime.test_job_watch import PATIENT, SOON_S
from tests.test_trainer import arguments, metrics, run

DYING = (
    PATIENT
    + """
import os, signal, time
from pathlib import Path

from engine.runtime import target_server

whole = target_server.send_batches

def send_batches(batches, prepare, *others):
    prepared = []

    def prepare_some(batch):
        prepared.append(batch)
        if len(prepared) > 5:
            Path({began!r}).write_text(str(time.time()))
            {end}
        return prepare(batch)

    whole(batches, prepare_some, *others)

target_server.send_batches = send_batches
"""
)


def weights_and_losses(folder: Path) -> tuple[bytes, list[dict]]:
    return (folder / "draft" / "model.safetensors").read_bytes(), metrics(folder)


@pytest.fixture
def accumulating(tmp_path) -> Path:
    """A DeepSpeed configuration with two micro-batches per step."""
    ds_config = json.loads(Path("ds_configs/zero2.json").read_text())
    ds_config["gradient_accumulation_steps"] = 2
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds_config))
    return path


def command_of(folder: Path, target: Path, corpus, ds_config: Path, *options: str) -> list[str]:
    command = arguments(folder, target, corpus, *options)
    command[command.index("ds_configs/zero3.json")] = str(ds_config)
    return command


def test_a_split_run_is_the_serial_run_bit_for_bit(tmp_path, tiny_target, tiny_corpus, accumulating):
    """To the end of the data, whose last step is filled up with silent batches; one draft rank, then two."""
    for num_draft, (num_target, look_ahead) in {1: (1, 0), 2: (1, 3)}.items():
        serial = tmp_path / f"serial{num_draft}"
        split = tmp_path / f"split{num_draft}"
        run(command_of(serial, tiny_target, tiny_corpus, accumulating, "overlap.placement=serial"), ranks=num_draft)
        options = ["overlap.placement=split", f"overlap.target_ranks={num_target}", f"overlap.look_ahead={look_ahead}"]
        options.append("overlap.trace_steps=[1,2]")
        run(command_of(split, tiny_target, tiny_corpus, accumulating, *options), ranks=num_draft + num_target)
        assert weights_and_losses(split) == weights_and_losses(serial)
        before, after = (json.loads((folder / "summary.json").read_text()) for folder in (serial, split))
        for name in ("before", "after", "prompt_lookup"):
            assert before[name]["acceptance_length"] == after[name]["acceptance_length"]
        samples = [(folder / "samples.jsonl").read_text().splitlines() for folder in (serial, split)]
        assert samples[0][0] == samples[1][0], "rank 0 and the first rank of the target begin with the same prompt"
        works = [json.loads((folder / "work.json").read_text()) for folder in (serial, split)]
        for piece in works[0]["pieces"]:
            if piece["part"] == "target_forward":  # each target rank prepares this share of the micro-batches
                piece |= {name: piece[name] * num_draft / num_target for name in ("flops", "bytes")}
        assert works[1] == works[0] | {"target_ranks": num_target} and works[0]["accumulation"] == 2
        line = json.loads((split / "metrics.jsonl").read_text().splitlines()[0])
        assert line["parts_s"]["target_forward"] > 0 and line["parts_s"]["backward"] > 0
        events = json.loads((split / "trace.json").read_text())["traceEvents"]
        assert {event["pid"] for event in events} == set(range(num_draft + num_target))


def test_a_shared_target_on_ranks_of_its_own_teaches_the_same_and_a_run_resumes_with_another_split(
    tmp_path, tiny_target, tiny_corpus
):
    checkpoints = ("checkpoint.every_steps=2",)
    serial = tmp_path / "serial"
    run(arguments(serial, tiny_target, tiny_corpus, "max_steps=4", "overlap.placement=serial"))
    split = tmp_path / "split"
    shared = ("overlap.placement=split", "overlap.target_ranks=2", "parallel.tp_size=2")
    run(arguments(split, tiny_target, tiny_corpus, *checkpoints, *shared, "max_steps=2"), ranks=3)
    options = (*checkpoints, "max_steps=4", "overlap.placement=split", "overlap.target_ranks=1", "checkpoint.resume=true")
    run(arguments(split, tiny_target, tiny_corpus, *options), ranks=2)
    losses = [[line["loss"] for line in metrics(folder)] for folder in (serial, split)]
    assert losses[1] == pytest.approx(losses[0], rel=2**-10), "the draft rounds to bf16, other sums of the target another way"
    fp8 = tmp_path / "fp8"
    options = ("max_steps=4", "overlap.placement=split", "overlap.target_ranks=1", "overlap.transfer_dtype=float8_e4m3")
    without_prompts = [word for word in arguments(fp8, tiny_target, tiny_corpus, *options) if "num_prompts" not in word]
    run([*without_prompts, "evaluation.num_prompts=0"], ranks=2)
    rounded = [line["loss"] for line in metrics(fp8)]
    assert rounded != losses[0] and rounded == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    ("end", "hang_s", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 60, "rank 1 (target rank 0, process"),
        ("time.sleep(1000)", 6, "the job waits for rank 1 (step 6"),
    ],
    ids=["killed", "hanging"],
)
def test_a_target_rank_that_ends_or_hangs_ends_the_job_and_is_named(end, hang_s, expected, tmp_path, tiny_target, tiny_corpus):
    began = tmp_path / "began"
    plugin = tmp_path / "dying.py"
    plugin.write_text(DYING.format(end=end, began=str(began)))
    options = [f"target.plugins=[{plugin}]", "overlap.placement=split", "overlap.target_ranks=1"]
    options.append(f"parallel.hang_s={hang_s}")
    ended = launch(arguments(tmp_path / "run", tiny_target, tiny_corpus, *options), ranks=2)
    took_s = time.time() - float(began.read_text())
    assert ended.returncode != 0 and took_s < SOON_S, ended.stderr
    assert expected in ended.stderr, ended.stderr


def test_memory_that_would_stop_a_copy_of_the_target_is_refused(tmp_path, tiny_target, tiny_corpus):
    options = ["overlap.placement=split", "overlap.target_ranks=2", "parallel.tp_size=2", "data.max_tokens=40000"]
    command = [word for word in arguments(tmp_path, tiny_target, tiny_corpus) if not word.startswith("data.max_tokens")]
    ended = launch([*command, *options, "overlap.look_ahead_mb=1"], ranks=3)
    assert ended.returncode != 0 and "overlap.look_ahead_mb = 1" in ended.stderr and "2 ranks share a copy" in ended.stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("overlap.placement=split",), "overlap.target_ranks = null: and overlap.placement=split belong together"),
        (("overlap.target_ranks=1",), "overlap.target_ranks = 1: and overlap.placement=split belong together"),
        (("overlap.placement=split", "overlap.target_ranks=1"), "leaves no rank for the draft; the job has 1 ranks"),
        (
            ("overlap.placement=split", "overlap.target_ranks=1", "target.store=/store"),
            "a store is written and read without ranks",
        ),
    ],
)
def test_ranks_that_cannot_be_divided_are_refused(options, problem, tmp_path, tiny_target, tiny_corpus):
    ended = launch(arguments(tmp_path, tiny_target, tiny_corpus, *options))
    assert ended.returncode != 0 and problem in ended.stderr
