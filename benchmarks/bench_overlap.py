"""Time training runs in every placement, next to each side alone, through `launcher/train.py`.

    python -m benchmarks.bench_overlap --json overlap.json

Run from the repository's root, on an otherwise idle machine with two cores. The target is a Llama
with random weights and as many layers as make its forward cost what the draft's step costs. Every
rank computes on one core. `serial` trains on one rank and gives the time of each side alone;
`split` has a rank for each side; `colocated` has two ranks, each with both sides and half of the
batches of a step. Times are medians of the steps after a warm-up, of the same batches.

The JSON is a list with one object per placement and look-ahead: seconds of a step that trains on
one micro-batch (for `colocated`, half of a step that trains on two), of each side alone, the
overlap efficiency, and the step that the planner's event model predicts from the two sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.record import machine_and_versions
from engine.overlap.bridge import Sides
from engine.overlap.event_model import BatchCost, EventModel
from engine.overlap.look_ahead import Limits
from engine.overlap.step_clock import DRAFT_PARTS, TARGET_FORWARD, draft_seconds, efficiency
from launcher.command import EMBEDDED_TARGET

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 5
LEAST_LAYERS = 5  # with three auxiliary layers, of which the last layer is none
FIRST_LAYERS = 8  # of the run that measures the cost of a layer
LOOK_AHEADS = (0, 1, 2, 4)  # of `split`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--steps", type=int, default=30, help="measured steps per run; default: %(default)s")
    parser.add_argument("--max_tokens", type=int, default=1024, help="tokens per micro-batch; default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = compare(Path(scratch), options.steps, options.max_tokens)
    for result in results:
        print(json.dumps(result))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        about = {"command": f"python -m benchmarks.bench_overlap --steps {options.steps}"} | machine_and_versions(
            torch.device("cpu")
        )
        options.json.with_suffix(".machine.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def compare(scratch: Path, steps: int, max_tokens: int) -> list[dict[str, Any]]:
    """Return the results of all placements. scratch: folder for the target and the runs."""
    runner = Runner(scratch, steps, max_tokens)
    probe = runner.run("probe", FIRST_LAYERS, 1, "serial")
    layers = max(LEAST_LAYERS, round(FIRST_LAYERS * probe["draft_s"] / probe["target_s"]))
    serial = runner.run("serial", layers, 1, "serial")
    alone = {"target_s": serial["target_s"], "draft_s": serial["draft_s"]}
    results = [result_of("serial", 0, serial["step_s"], alone, sum(alone.values()))]
    cost = BatchCost(alone["target_s"], alone["draft_s"])
    for look_ahead in LOOK_AHEADS:
        options = ("overlap.target_ranks=1", f"overlap.look_ahead={look_ahead}")
        split = runner.run(f"split-{look_ahead}", layers, 2, "split", *options)
        model = EventModel(Sides(1, 1), Limits(look_ahead), steps, 1, lambda rank, index: cost).run()
        results.append(result_of("split", look_ahead, split["step_s"], alone, model.step_s(WARM_UP_STEPS)))
    colocated = runner.run("colocated", layers, 2, "colocated", "overlap.look_ahead=1")
    results.append(result_of("colocated", 1, colocated["step_s"] / 2, alone, sum(alone.values()) / 2))
    return results


def result_of(placement: str, look_ahead: int, step_s: float, alone: dict[str, float], predicted_s: float) -> dict[str, Any]:
    parts = dict.fromkeys(DRAFT_PARTS, 0.0) | {TARGET_FORWARD: alone["target_s"], DRAFT_PARTS[0]: alone["draft_s"]}
    longer_s = max(alone.values())
    return {
        "placement": placement,
        "look_ahead": look_ahead,
        "step_s": step_s,
        **alone,
        "efficiency": efficiency(parts, step_s),
        "over_longer_side": step_s / longer_s,
        "predicted_step_s": predicted_s,
    }


class Runner:
    """Runs training jobs with a target of a given number of layers."""

    def __init__(self, scratch: Path, steps: int, max_tokens: int) -> None:
        self._scratch = scratch
        self._steps = steps + WARM_UP_STEPS
        self._max_tokens = max_tokens

    def run(self, name: str, layers: int, ranks: int, placement: str, *options: str) -> dict[str, float]:
        """Return the median seconds of a step and of each side in it."""
        output = self._scratch / name
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["launcher/train.py", "--ds_config", "ds_configs/zero2.json", f"output_dir={output}"]
        command += [f"target.path={self._target(layers)}", f"overlap.placement={placement}", *options]
        command += [f"max_steps={self._steps}", f"data.max_tokens={self._max_tokens}", "log_every_steps=1"]
        command += ["evaluation.num_prompts=0", "parallel.cpu_threads=1", f"data.cache_dir={self._scratch / 'cache'}"]
        command.append(f"target.aux_layers=[0,{layers // 2},{layers - 2}]")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][WARM_UP_STEPS:]
        return {
            "step_s": statistics.median(line["step_s"] for line in lines),
            "target_s": statistics.median(line["parts_s"][TARGET_FORWARD] for line in lines),
            "draft_s": statistics.median(draft_seconds(line["parts_s"]) for line in lines),
        }

    def _target(self, layers: int) -> Path:
        """Write the embedded target's shapes with another number of layers, and random weights."""
        folder = self._scratch / f"target-{layers}"
        if not folder.exists():
            config = AutoConfig.from_pretrained(EMBEDDED_TARGET)
            config.num_hidden_layers = layers
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            for path in EMBEDDED_TARGET.iterdir():
                if not (folder / path.name).exists() and path.suffix != ".safetensors":
                    (folder / path.name).write_bytes(path.read_bytes())
        return folder


if __name__ == "__main__":
    main()
