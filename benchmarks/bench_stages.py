"""Time an optimizer step of a tiny draft at ZeRO stages 0 to 3, next to that of an earlier commit.

    python -m benchmarks.bench_stages --before FOLDER [--rounds 3] [--json FILE]

Run from the repository's root. FOLDER is a checkout of the earlier commit. The draft is the one of
the tests (width 32), so the time of a step is the host's overhead. It runs seven TTT steps on two
ranks over gloo in fp32. The checkouts run alternately, in separate processes, and the stages
alternate after every step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import write_record

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("zero0", "zero1", "zero2", "zero3")
NUM_RANKS = 2
WARM_UP = 5
NUM_STEPS = 45
LAUNCH = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]


def time_stages() -> dict[str, float]:
    """Return the median ms of a step by stage, measured on this rank with the checkout's engine."""
    from engine.models.normaliser import Normaliser
    from engine.parallel.mesh import World
    from engine.parallel.zero import ZeroDraft, connect, disconnect
    from tests.training import Job, zero_step

    rank = int(os.environ["RANK"])
    world = World(rank=rank, size=NUM_RANKS, local_rank=rank, local_size=NUM_RANKS)
    connect(world, timeout_s=120, cpu_threads=1)
    runs = {}
    for stage in STAGES:
        job = Job(stage, ttt_steps=7)
        zero = ZeroDraft(job.draft(), job.test(), job.ds_config())
        runs[stage] = (job, zero, Normaliser(zero.objective, zero.forward, world))
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for step in range(WARM_UP + NUM_STEPS):
        for stage, (job, zero, normalise) in runs.items():
            micros = job.micros(step, rank)
            start = time.perf_counter()
            zero_step(zero, normalise, world, micros)
            seconds[stage].append(time.perf_counter() - start)
    disconnect()
    return {stage: 1e3 * statistics.median(times[WARM_UP:]) for stage, times in seconds.items()}


def run_checkout(folder: Path) -> dict[str, float]:
    """Run a checkout's engine in new processes and return the median ms of a step by stage."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *LAUNCH, str(Path(__file__).resolve()), "--worker"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {folder} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def commit_of(folder: Path) -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the earlier commit")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both checkouts; default: 3")
    parser.add_argument("--json", type=Path, help="file to write the figures, machine, versions and commit to")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        times = time_stages()
        if os.environ["RANK"] == "0":
            print(json.dumps(times))
        return
    checkouts = {"after": ROOT} | ({"before": arguments.before.resolve()} if arguments.before else {})
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(arguments.rounds):
        for name, folder in checkouts.items():
            rounds[name].append(run_checkout(folder))
    rows = []
    for name, folder in checkouts.items():
        stage_ms = {stage: [times[stage] for times in rounds[name]] for stage in STAGES}
        ratios = [times["zero3"] / times["zero2"] for times in rounds[name]]
        rows.append({"run": name, "commit": commit_of(folder), "ms per step": stage_ms, "zero3 over zero2": ratios})
        medians = "  ".join(f"{stage} {statistics.median(times):.1f} ms" for stage, times in stage_ms.items())
        print(f"{name:<7} {medians}  zero3 over zero2: {statistics.median(ratios):.2f}")
    command = f"python -m benchmarks.bench_stages --before COMMIT --rounds {arguments.rounds}"
    write_record(arguments.json, command, rows)


if __name__ == "__main__":
    main()
