"""Train the embedded target's draft on the device and on the CPU, and compare the losses.

Both runs use ZeRO-3 in bf16, the target in fp32, and the same seed. In the run on the device, the
target runs ahead. On a GPU, the losses may differ by rounding. On a CPU, the runs differ only in
look-ahead, so they must agree exactly.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Largest relative difference of a step's loss. bf16 keeps 8 bits, so one rounding is 2**-9. The
# loss of a step is a mean over hundreds of rows, and the weights diverge slowly over the few steps
# that are compared.
TOLERANCE = {"cuda": 2**-6, "cpu": 0.0}
POLL_S = 0.5


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"device": Path(scratch) / "device", "cpu": Path(scratch) / "cpu"}
        runs = {
            "device": start(folders["device"], options.steps, look_ahead=1, on_gpu=options.device == "cuda"),
            "cpu": start(folders["cpu"], options.steps, look_ahead=0, on_gpu=False),
        }
        seconds = wait(runs)
        failed = [name for name, run in runs.items() if run.returncode != 0]
        if failed:
            print(f"train.py failed on: {', '.join(failed)}")
            return 1
        steps = {name: read_metrics(folder) for name, folder in folders.items()}
    record = compare(steps["device"], steps["cpu"], TOLERANCE[options.device])
    record["seconds"] = seconds
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(record["lines"]))
    return 0 if record["equal"] else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps; default: %(default)s")
    return parser.parse_args()


def start(folder: Path, steps: int, look_ahead: int, on_gpu: bool) -> subprocess.Popen:
    """Start train.py with its default options, without the measurement of acceptance."""
    command = [sys.executable, "launcher/train.py", "--ds_config", "ds_configs/zero3.json"]
    command += [f"output_dir={folder}", f"max_steps={steps}", "overlap.placement=colocated", f"overlap.look_ahead={look_ahead}"]
    command += ["log_every_steps=1", "evaluation.num_prompts=0", "target.dtype=float32"]
    environment = dict(os.environ)
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def wait(runs: dict[str, subprocess.Popen]) -> dict[str, float]:
    """Wait for all runs and return the seconds of each.

    As soon as one run fails, the others are terminated.
    """
    start_s = time.monotonic()
    seconds: dict[str, float] = {}
    while len(seconds) < len(runs):
        time.sleep(POLL_S)
        for name, run in runs.items():
            if name in seconds or run.poll() is None:
                continue
            seconds[name] = round(time.monotonic() - start_s, 1)
            if run.returncode != 0:
                for other in runs.values():
                    other.terminate()
    return seconds


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def compare(device: list[dict[str, Any]], cpu: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """Compare the losses of two runs step by step. A loss of None (not finite) never agrees."""
    device_losses = {step["step"]: step["loss"] for step in device}
    cpu_losses = {step["step"]: step["loss"] for step in cpu}
    same_steps = device_losses.keys() == cpu_losses.keys() and len(cpu_losses) > 0
    differences = {}
    for step in sorted(device_losses.keys() & cpu_losses.keys()):
        one = device_losses[step]
        other = cpu_losses[step]
        if one is None or other is None:
            differences[step] = None
        else:
            differences[step] = abs(one - other) / abs(other)
    finite = [difference for difference in differences.values() if difference is not None]
    all_finite = len(finite) == len(differences)
    largest = max(finite, default=0.0)
    equal = same_steps and all_finite and largest <= tolerance
    speed = device[-1]["tokens_per_s"] if device else 0.0
    lines = [
        f"{len(differences)} steps, largest relative difference of the loss {largest:.2e}, allowed {tolerance:.2e}",
        f"last loss {device[-1]['loss']} against {cpu[-1]['loss']}; {speed:,.0f} tokens/s" if device and cpu else "no steps",
    ]
    if not same_steps:
        lines.append("the two runs logged different steps")
    return {"lines": lines, "equal": equal, "largest": largest, "device": device, "cpu": cpu}


if __name__ == "__main__":
    sys.exit(main())
