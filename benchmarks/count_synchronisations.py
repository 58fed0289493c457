"""Count host synchronisations and kernel launches by job, without a GPU.

The jobs are those of `tests/device_jobs.py` on `tests/fake_device.py`: a tiny target's forward, a
training run from data to report with two steps, and a capture. The counts do not depend on widths;
launches grow with the number of layers and TTT steps.
"""

import argparse
import collections
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this when a kernel is defined.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.record import machine_and_versions
from tests.device_jobs import Step, forward_of, run_capture, run_training, training_options
from tests.fake_device import FakeDevice, Wait
from tests.parallel.families import tiny_model
from tests.tiny_target import write_corpus, write_target

FAMILIES = ("llama", "qwen3_moe", "gemma3_text", "llama4_text")


def listed(waits: Iterable[Wait]) -> list[dict[str, Any]]:
    """Return the waits by stage, kind and place, with the count of each."""
    counts = collections.Counter(waits)
    rows = [asdict(wait) | {"count": count} for wait, count in counts.items()]
    return sorted(rows, key=lambda row: (row["stage"], row["place"], row["kind"]))


def summary(step: Step) -> dict[str, Any]:
    """Return the number of waits and launches of a step, and the list of its waits."""
    return {"waits": len(step.waits), "launches": step.launches, "list": listed(step.waits)}


def count() -> dict[str, Any]:
    """Run all jobs and return the waits and launches of each."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, FakeDevice() as fake:
        folder = Path(name)
        target = write_target(folder / "target")
        (folder / "corpus").mkdir()
        corpus = write_corpus(folder / "corpus")
        forwards = {family: forward_of(tiny_model(family).bfloat16(), (0, 1, 2)) for family in FAMILIES}
        found["target forward, per micro-batch"] = {family: summary(step) for family, step in forwards.items()}
        fake.waits.clear()
        draft = run_training(training_options(folder / "run", target, corpus.train, corpus.held_out))
        found["training step, per micro-batch, logged"] = summary(draft.steps[-1])
        found["training run"] = listed(fake.waits)
        fake.waits.clear()
        report = run_capture(folder / "store", target, corpus.train)
        found["capture"] = {"tokens": report.num_tokens, "list": listed(fake.waits)}
    return found


def main() -> None:
    """Print the counts as JSON, or add them to a file that may already contain others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to add the counts to")
    parser.add_argument("--label", default="now", help="key of the counts in that file")
    options = parser.parse_args()
    command = shlex.join(["python", *sys.argv])
    record = {"command": command} | machine_and_versions(torch.device("cpu")) | count()
    if options.json is None:
        print(json.dumps(record, indent=1))
        return
    kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    text = json.dumps(kept | {options.label: record}, indent=1)
    options.json.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
