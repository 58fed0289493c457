"""A rank that fails, is killed, stops or hangs ends the whole job soon, and is named; run through the real launcher."""

import multiprocessing
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from engine.runtime import job_watch
from engine.runtime.progress import Progress
from engine.runtime.run_stop import EXIT_CODE, EXIT_CODE_OF_FILE
from tests.distributed import ROOT, free_port, launch
from tests.step_plugins import before_each_step
from tests.test_trainer import DEEPSPEED, ENVIRONMENT, arguments, metrics, num_logged, run
from tests.waiting import wait_until

STEP = 6
SOON_S = 120
# A busy machine may take long to answer: ranks have a minute to send their stacks, and the job ends once all have done so.
PATIENT = """
from engine.runtime import job_watch

take_one = job_watch.MainWatch._take
job_watch.SECONDS_FOR_STACKS = 60.0

def take(self, peer, rank, message):
    take_one(self, peer, rank, message)
    is_complete = self._stacks is not None and len(self._stacks) == self.job.size
    job_watch.SECONDS_FOR_STACKS = 0.0 if is_complete else 60.0

job_watch.MainWatch._take = take
"""
# A rank that has a fault in a step.
FAULT = """
if step == {step} and rank == {rank}:
    Path({began!r}).write_text(str(time.time()))
    {fault}
"""
FAULTY = PATIENT + "job_watch.SILENT_IN_STEPS_S = {silent_s}\n" + before_each_step(FAULT)
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
HANG = "time.sleep(1000)"
FAIL = "raise RuntimeError('out of luck')"
REFUSE = "raise ValueError('an unusable value')"
FAULTS = {
    "kill 0": (KILL, 0, "rank 0 (process", "has ended without a message"),
    "kill 1": (KILL, 1, "rank 1 (process", "has ended without a message"),
    "stop 2": (STOP, 2, "rank 2 (process", "has not answered for"),
    "hang 0": (HANG, 0, "the job waits for rank 0 (step 6", "parallel.hang_s"),
    "fail 0": (FAIL, 0, "RuntimeError: out of luck", "Traceback"),
    "fail 1": (FAIL, 1, "rank 1: RuntimeError: out of luck", "Traceback"),
    "refuse 1": (REFUSE, 1, "train.py: rank 1: an unusable value", ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_any_rank_ends_the_job_and_is_named_once(name, tmp_path, tiny_target, tiny_corpus):
    fault, rank, named, reason = FAULTS[name]
    began = tmp_path / "began"
    plugin = tmp_path / "faulty.py"
    # Each limit is shorter than in real jobs where the test waits for it, and long where it must not be reached.
    silent_s = 8.0 if fault == STOP else 60.0
    hang_s = 6 if fault == HANG else 60
    plugin.write_text(FAULTY.format(step=STEP, rank=rank, began=str(began), fault=fault, silent_s=silent_s))
    options = [f"target.plugins=[{plugin}]", f"parallel.hang_s={hang_s}", "evaluation.num_prompts=0", "epochs=8"]
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


SIGNAL = "os.kill(os.getpid(), signal.SIGTERM)"
FILE = "Path({stop!r}).touch()"
# A rank that asks for a stop in step 3. From then on each step takes longer than the one before, until all ranks stop.
ASKING = before_each_step("""
if rank == 1 and step >= 3:
    if step == 3:
        {request}
    time.sleep(0.3 * (step - 2))
""")
STOPPING = ("epochs=2", "parallel.hang_s=20")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_target, tiny_corpus) -> Path:
    """The folder of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    run([*arguments(folder, tiny_target, tiny_corpus), *STOPPING], ranks=2)
    return folder


@pytest.mark.parametrize("how", ["signal on rank 1", "file"])
def test_a_run_that_is_asked_to_stop_is_saved_and_continues_as_if_it_had_not_stopped(
    how, whole, tmp_path, tiny_target, tiny_corpus
):
    folder = tmp_path / "run"
    plugin = tmp_path / "stopping.py"
    request = SIGNAL if how == "signal on rank 1" else FILE.format(stop=str(folder / "STOP"))
    plugin.write_text(ASKING.format(request=request))
    stopped = launch([*arguments(folder, tiny_target, tiny_corpus), *STOPPING, f"target.plugins=[{plugin}]"], ranks=2)
    assert stopped.returncode == (EXIT_CODE if how != "file" else EXIT_CODE_OF_FILE), stopped.stderr
    assert "which is saved" in stopped.stdout and stopped.stderr.count("train.py") == 0
    num_steps = len(metrics(folder))
    assert 3 <= num_steps < len(metrics(whole)) and not (folder / "STOP").exists() and not (folder / "draft").exists()
    run([*arguments(folder, tiny_target, tiny_corpus), *STOPPING, "checkpoint.resume=true"], ranks=2)
    assert metrics(folder) == metrics(whole)
    weights = [(path / "draft" / "model.safetensors").read_bytes() for path in (folder, whole)]
    assert weights[0] == weights[1]


def command_line(process: psutil.Process) -> list[str]:
    """Words of a process's command; none if it has ended."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def mapped_files(processes: Iterable[psutil.Process]) -> set[Path]:
    """Files that processes have in their memory."""
    files = set()
    for process in processes:
        with suppress(psutil.Error):
            files |= {Path(region.path) for region in process.memory_maps()}
    return files


def names_one_of(path: Path, pids: set[int]) -> bool:
    """Whether one of the numbers in a file's name is the id of one of these processes."""
    numbers = {int(digits) for digits in re.findall(r"\d+", path.name)}
    return not numbers.isdisjoint(pids)


@pytest.mark.parametrize(("killed", "num_ranks"), [("runner", 1), ("launcher", 2)])
def test_ranks_do_not_outlive_their_launcher(killed, num_ranks, tmp_path, tiny_target, tiny_corpus):
    """Killed with SIGKILL, of which no launcher can tell its ranks."""
    shared_memory = set(Path("/dev/shm").iterdir())
    launcher_options = ["--num_accelerators", str(num_ranks), "--master_port", str(free_port())]
    options = [option for option in arguments(tmp_path, tiny_target, tiny_corpus) if option != "evaluation.num_prompts=2"]
    command = [DEEPSPEED[0], *launcher_options, *options, "epochs=500", "evaluation.num_prompts=0"]
    runner = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family = []
    try:
        wait_until(lambda: num_logged(tmp_path) >= 3, 400, lambda: runner.poll() is None)
        family = psutil.Process(runner.pid).children(recursive=True)
        launcher = next(process for process in family if "deepspeed.launcher.launch" in command_line(process))
        ranks = [process for process in family if "launcher/train.py" in " ".join(command_line(process)[:3])]
        assert len(ranks) == num_ranks
        mapped = mapped_files(family)
        victim = psutil.Process(runner.pid) if killed == "runner" else launcher
        victim.kill()
        _, alive = psutil.wait_procs(ranks, timeout=SOON_S)  # they save a checkpoint
        assert not alive
    finally:
        if runner.poll() is None:
            family += psutil.Process(runner.pid).children(recursive=True)
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        runner.kill()
        runner.wait()
    pids = {runner.pid} | {process.pid for process in family}
    left = set(Path("/dev/shm").iterdir()) - shared_memory  # tests that run next to this one have files there too
    own = {path for path in left if path in mapped or names_one_of(path, pids)}
    wait_until(lambda: not any(path.exists() for path in own), SOON_S, tell=lambda: own)
    assert (tmp_path / "checkpoints" / "latest").exists(), "the run stopped as it does after a signal"
    assert not (tmp_path / "draft").exists(), "the run stopped before its end"


def end_while_the_main_thread_cannot_write(marker: Path) -> None:
    """End this process from another thread, while the main thread holds a lock and writes to a full pipe."""
    job_watch.SECONDS_OF_LAST_ACTIONS = 0.2
    _, writing = os.pipe()
    for number in (1, 2):
        os.dup2(writing, number)
    lock = threading.RLock()
    job_watch.before_end(marker.touch)
    job_watch.before_end(lambda: lock.acquire() and None)
    watch = job_watch.MainWatch(job_watch.Job(0, 1, 0, "train.py", "", marker.parent), Progress(), None, 1.0)
    threading.Timer(0.2, watch._end_job, ("out of luck", 7)).start()
    with lock:
        print("a" * (1 << 20), flush=True)


def test_a_process_ends_although_nobody_reads_its_output(tmp_path):
    marker = tmp_path / "removed"
    process = multiprocessing.get_context("forkserver").Process(target=end_while_the_main_thread_cannot_write, args=(marker,))
    process.start()
    process.join(120)  # importing this module included
    code = process.exitcode
    process.kill()
    assert code == 7 and marker.exists()
