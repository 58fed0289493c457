"""Compare the losses of the embedded job under every shipped ZeRO configuration, in fp32 and bf16.

    python benchmarks/stages_side_by_side.py

Each run starts launcher/train.py on two ranks. The losses must agree. The command prints a table
and writes `benchmarks/results/stages.json`.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "stages.json"
CONFIGS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
NUM_STEPS = 20
NUM_RANKS = 2
OPTIONS = [f"max_steps={NUM_STEPS}", "evaluation.num_prompts=0", "data.max_tokens=256"]
LAUNCH = ["-m", "torch.distributed.run", f"--nproc_per_node={NUM_RANKS}", "--standalone", "launcher/train.py"]


def train(config: str, precision: str, folder: Path) -> list[float]:
    """Run training and return the losses. With fp32, the target runs in fp32 too."""
    ds_config = json.loads((ROOT / "ds_configs" / f"{config}.json").read_text(encoding="utf-8"))
    ds_config["bf16"]["enabled"] = precision == "bf16"
    path = folder / f"{config}_{precision}.json"
    output = folder / f"{config}_{precision}"
    path.write_text(json.dumps(ds_config), encoding="utf-8")
    options = [*OPTIONS, f"output_dir={output}", *(["target.dtype=float32"] if precision == "fp32" else [])]
    command = [sys.executable, *LAUNCH, "--ds_config", str(path), *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def difference(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference between the losses of two runs."""
    return max(abs(loss - wanted) / wanted for loss, wanted in zip(losses, expected, strict=True))


def main() -> None:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True)
    losses: dict[str, dict[str, list[float]]] = {}
    print(f"{'configuration':<15}{'precision':<11}{'first loss':>12}{'last loss':>12}{'from zero0':>14}{'from fp32':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16"):
            runs = losses.setdefault(precision, {})
            for config in CONFIGS:
                run = runs[config] = train(config, precision, Path(folder))
                apart = f"{difference(run, runs['zero0']):>14.1e}{difference(run, losses['fp32'][config]):>12.1e}"
                print(f"{config:<15}{precision:<11}{run[0]:>12.6f}{run[-1]:>12.6f}{apart}", flush=True)
    record = {
        "command": "python benchmarks/stages_side_by_side.py",
        "run": " ".join(["python", *LAUNCH, *OPTIONS]),
        "commit": commit.stdout.strip(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "largest relative difference from zero0": {
            precision: max(difference(run, runs["zero0"]) for run in runs.values()) for precision, runs in losses.items()
        },
        "losses": losses,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
