"""Measure the time from an empty environment to the first trained draft.

    python benchmarks/peers/time_first_draft.py [--max_steps 900] [--json FILE]

The stages are those of the README's first command: a new virtual environment, the installation, and
the training job of the embedded target, which ends with an exported draft and its acceptance length.
Everything is written below a temporary folder. `--max_steps` shortens the job, and the figures say so.

Peers are not measured: docs/comparison.md says why none of them trains a draft on a machine without
a GPU and a model hub.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.record import ROOT, show, write_record

POLL_S = 0.2
RUN = "run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, help="steps of the training job; default: those of the README")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the training job")
    parser.add_argument("--json", type=Path, help="file to write the stages, machine, versions and commit to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options)
        draft = reached(Path(folder) / RUN)
    show(rows, "{:,.1f}")
    print(f"acceptance length {draft['acceptance_length']:.2f}, {draft['speed']:.2f} times the speed of plain decoding")
    words = ["python", "benchmarks/peers/time_first_draft.py", "--ranks", str(options.ranks)]
    if options.max_steps is not None:
        words += ["--max_steps", str(options.max_steps)]
    write_record(options.json, shlex.join(words), rows, further={"draft": draft})


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, str | float]]:
    """Return the seconds of every stage, in order."""
    environment = folder / "venv"
    clone = folder / "clone"
    run = folder / RUN
    python = environment / "bin/python"
    seconds = {}
    seconds["clone"] = timed(["git", "clone", "-q", str(ROOT), str(clone)], folder)
    seconds["virtual environment"] = timed([sys.executable, "-m", "venv", str(environment)], folder)
    pip = [str(python), "-m", "pip", "install", "-q", "--no-compile", "-c", "constraints.txt", "-e", "."]
    seconds["installation"] = timed(pip, clone)
    words = [str(environment / "bin/deepspeed"), "--num_accelerators", str(options.ranks), "launcher/train.py"]
    words += ["--ds_config", "ds_configs/zero3.json", f"output_dir={run}"]
    if options.max_steps is not None:
        words.append(f"max_steps={options.max_steps}")
    seconds |= time_job(words, clone, environment, run)
    seconds["total"] = sum(seconds.values())
    return [{"stage": stage, "seconds": duration} for stage, duration in seconds.items()]


def reached(run: Path) -> dict[str, float | None]:
    """Return the acceptance of the trained draft, and the speed of decoding with it, from the run's summary."""
    after = json.loads((run / "summary.json").read_text(encoding="utf-8"))["after"]
    speed = after["tokens_per_s"] / after["plain_tokens_per_s"]
    names = ("acceptance_length", "confidence", "num_prompts", "num_tokens", "mismatches")
    return {name: after[name] for name in names} | {"speed": speed}


def time_job(words: list[str], clone: Path, environment: Path, run: Path) -> dict[str, float]:
    """Return the seconds until the first metrics are written, and from then until the job ends."""
    paths = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": ""}
    start_s = time.perf_counter()
    process = subprocess.Popen(words, cwd=clone, env=os.environ | paths)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 0):
        time.sleep(POLL_S)
    first_s = time.perf_counter() - start_s
    code = process.wait()
    if code != 0 or not (run / "draft/model.safetensors").exists():
        raise RuntimeError(
            f"the training job ended with exit code {code} and no draft in {run / 'draft'}; see its output above"
        )
    rest_s = time.perf_counter() - start_s - first_s
    return {"start of the job to its first metrics": first_s, "rest of the training, export, acceptance": rest_s}


def timed(words: list[str], folder: Path) -> float:
    start_s = time.perf_counter()
    subprocess.run(words, cwd=folder, check=True)
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
