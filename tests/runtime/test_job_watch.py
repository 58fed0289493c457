"""A rank that fails, is killed, stops or hangs ends the whole job soon, and is named; run through the real launcher."""

import time

import pytest

from tests.distributed import launch
from tests.test_trainer import arguments

STEP = 6
SOON_S = 30
# A rank that has a fault in a step. The limits are shorter than in real jobs, so that the test does not wait for them.
FAULTY = """
import os, signal, time
from pathlib import Path

import torch

from engine.parallel.zero import ZeroDraft
from engine.runtime import job_watch

job_watch.SILENT_IN_STEPS_S = 5.0
whole = ZeroDraft.train
calls = []

def train(self, *arguments):
    calls.append(arguments)
    if len(calls) == {step} and torch.distributed.get_rank() == {rank}:
        Path({began!r}).write_text(str(time.time()))
        {fault}
    return whole(self, *arguments)

ZeroDraft.train = train
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
HANG = "time.sleep(1000)"
FAIL = "raise RuntimeError('out of luck')"
REFUSE = "raise ValueError('an unusable value')"
FAULTS = {
    "kill 0": (KILL, 0, "rank 0 (process", "has ended without a message"),
    "kill 1": (KILL, 1, "rank 1 (process", "has ended without a message"),
    "stop 0": (STOP, 0, "rank 0 (process", "has not answered for"),
    "stop 2": (STOP, 2, "rank 2 (process", "has not answered for"),
    "hang 0": (HANG, 0, "the job waits for rank 0 (step 6", "parallel.hang_s"),
    "hang 2": (HANG, 2, "the job waits for rank 2 (step 6", "parallel.hang_s"),
    "fail 0": (FAIL, 0, "RuntimeError: out of luck", "Traceback"),
    "fail 1": (FAIL, 1, "rank 1: RuntimeError: out of luck", "Traceback"),
    "refuse 1": (REFUSE, 1, "train.py: rank 1: an unusable value", ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_any_rank_ends_the_job_and_is_named_once(name, tmp_path, tiny_target, tiny_corpus):
    fault, rank, named, reason = FAULTS[name]
    began = tmp_path / "began"
    plugin = tmp_path / "faulty.py"
    plugin.write_text(FAULTY.format(step=STEP, rank=rank, began=str(began), fault=fault))
    options = [f"target.plugins=[{plugin}]", "parallel.hang_s=3", "evaluation.num_prompts=0", "epochs=8"]
    command = [word for word in arguments(tmp_path / "run", tiny_target, tiny_corpus) if "num_prompts" not in word]
    ended = launch([*command, *options], ranks=3)
    took_s = time.time() - float(began.read_text())
    assert ended.returncode != 0 and took_s < SOON_S, ended.stderr
    assert ended.stderr.count(named) == 1 and reason in ended.stderr, ended.stderr
    others = [line for line in ended.stderr.splitlines() if "gloo" in line.lower() or "Connection closed" in line]
    assert not others, "the first cause is printed, not what follows from it"
    stacks = tmp_path / "run" / "stacks"
    if fault == HANG:
        assert "sleep" in ended.stderr and len(list(stacks.iterdir())) == 3
    else:
        assert not stacks.exists()
