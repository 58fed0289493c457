"""Compare the draft's training step with SpecForge's, with the same weights and the same batch.

    python benchmarks/peers/bench_specforge.py [--shape cpu|llama-8b] [--backend sdpa] [--json FILE]

A step consists of the target head, the forward pass and the backward pass. The losses and gradients
of both sides are first checked to be equal; then their steps are timed alternately. Each side runs
in a separate process. DraftSpeed keeps freed host memory for the next step, as in every run
(engine/host/freed_memory.py). SpecForge runs with its own torch.compile. On a CPU it uses its plain
loss, because its Triton loss needs a GPU.

If SpecForge cannot be imported, the first run installs it from PyPI into a separate folder, without
its dependencies. It uses the torch and Transformers of this environment.
"""

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benchmarks.peers.task import Task, task_json
from benchmarks.record import machine_and_versions

ROOT = Path(__file__).resolve().parents[2]
PEER = "specforge==0.2.0"
# In addition to the check. SpecForge compiles, and both allocators reach a steady state.
WARM_UP_ROUNDS = 3
CPU_BAR = dict(hidden_size=512, intermediate_size=1792, num_heads=8, num_key_value_heads=2, head_dim=64)
LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_heads=32, num_key_value_heads=8, head_dim=128)
SHAPES = {
    "cpu": CPU_BAR | dict(draft_vocab_size=8000, vocab_size=32000, num_tokens=1024),
    "cpu-tiny": CPU_BAR | dict(draft_vocab_size=256, vocab_size=512, num_tokens=128),
    "llama-8b": LLAMA_8B | dict(draft_vocab_size=32000, vocab_size=128256, num_tokens=4096),
}
# Relative tolerances of the losses, and of the gradients per tensor in the Frobenius norm.
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 5e-2)}


@dataclass(frozen=True)
class Side:
    """One of the two processes that are compared."""

    name: str
    process: subprocess.Popen

    def ask(self, order: str) -> Any:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}; see its error output above")
        return json.loads(answer)


def main() -> None:
    options = read_options()
    install_peer(options.peer_folder)
    cases = []
    for hits in options.hits:
        for mask in options.mask:
            task = Task(**SHAPES[options.shape], mask=mask, hits=hits, device=options.device, dtype=options.dtype)
            cases.append(compare(task, options))
            show(cases[-1:])
    show(cases)
    if options.json:
        options.json.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
        about = {"command": shlex.join(["python", "benchmarks/peers/bench_specforge.py", *command_words(options)])}
        about |= machine_and_versions(torch.device(options.device)) | {"peer": PEER}
        options.json.with_suffix(".machine.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b" if on_gpu else "cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--backend", default="sdpa", help="SpecForge's attention: sdpa, flex_attention or fa")
    parser.add_argument("--mask", type=float, nargs="+", default=[1.0, 0.5, 0.1], help="shares of assistant tokens")
    parser.add_argument("--hits", choices=("all", "random"), nargs="+", default=["all", "random"])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side, in turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--json",
        type=Path,
        help="file for the figures, one object per case; machine and versions go to a second file",
    )
    parser.add_argument("--peer_folder", type=Path, default=ROOT / "outputs/peers/specforge-0.2.0", help="folder of SpecForge")
    return parser.parse_args()


def command_words(options: argparse.Namespace) -> list[str]:
    words = [f"--{name}={getattr(options, name)}" for name in ("shape", "device", "dtype", "backend", "rounds", "threads")]
    return [*words, "--mask", *map(str, options.mask), "--hits", *options.hits]


def install_peer(folder: Path) -> None:
    """Install SpecForge into `folder` unless it can be imported.

    Triton is installed there too if this environment does not have it.
    """
    if importlib.util.find_spec("specforge"):
        return
    packages = [PEER] if importlib.util.find_spec("triton") else [PEER, "triton"]
    if not (folder / "specforge").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
        subprocess.run(pip, check=True)


def compare(task: Task, options: argparse.Namespace) -> dict[str, float]:
    """Run one task on both sides and return their time and memory.

    Raises RuntimeError if the results differ.
    """
    sides = [start("draftspeed", task, options), start("specforge", task, options)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = []
            for side in sides:
                file = Path(folder) / f"{side.name}.safetensors"
                side.ask(f"check {file}")
                results.append(load_file(file))
        differences = check_equal(*results, TOLERANCE[task.dtype])
        times = [[side.ask("time") for side in sides] for _ in range(WARM_UP_ROUNDS + options.rounds)][WARM_UP_ROUNDS:]
        memory = [side.ask("memory") for side in sides]
    finally:
        for side in sides:
            side.process.kill()
            side.process.wait()
    ours_s, theirs_s = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        **shares(task),
        "speedup": theirs_s / ours_s,
        "memory_ratio": memory[0] / memory[1],
        **differences,
        "seconds": [ours_s, theirs_s],
        "all_seconds": times,
        "peak_bytes": memory,
    }


def start(name: str, task: Task, options: argparse.Namespace) -> Side:
    """Start the process of one side, which can import the repository and waits for commands.

    SpecForge's process can also import from SpecForge's folder.
    """
    command = [sys.executable, "-m", f"benchmarks.peers.serve_{name}", "--task", task_json(task)]
    command += ["--backend", options.backend, "--threads", str(options.threads)]
    paths = [str(ROOT), str(options.peer_folder)] if name == "specforge" else [str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return Side(name, subprocess.Popen(command, env=environment, **pipes))


def check_equal(ours: dict, theirs: dict, tolerances: tuple[float, float]) -> dict[str, float]:
    """Return the largest relative differences. Raises RuntimeError above the tolerances."""
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"only one side has gradients of {sorted(ours.keys() ^ theirs.keys())}")
    losses = ours.pop("losses")
    expected = theirs.pop("losses")
    loss = ((losses - expected).abs() / expected.abs()).max().item()
    errors = {name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours}
    worst = max(errors, key=errors.get)
    if not (loss <= tolerances[0] and errors[worst] <= tolerances[1]):
        raise RuntimeError(f"not equal: losses differ by {loss:.2g}, the gradient of {worst} by {errors[worst]:.2g}")
    return {"max_relative_loss_difference": loss, "max_relative_gradient_difference": errors[worst]}


def shares(task: Task) -> dict[str, float]:
    """Return the shares of a task: `mask` of its settings, hits, and tokens with loss.

    A hit is a slot for which the target's most likely token is in the draft vocabulary.
    """
    tensors = task.tensors()
    slots_N = tensors.mask_T.nonzero().flatten() + 1
    best_N = (tensors.last_hidden_TD[slots_N] @ tensors.head_VD.T).argmax(-1)
    hits = tensors.in_draft_V[best_N].float()
    return {"mask": task.mask, "hit_share": hits.mean().item(), "loss_share": hits.sum().item() / task.num_tokens}


def show(cases: list[dict]) -> None:
    table = Table("mask", "in draft", "loss", "speed-up", "memory", "DraftSpeed", "SpecForge", "losses differ", "gradients")
    for case in cases:
        ours_s, theirs_s = case["seconds"]
        ours_bytes, theirs_bytes = case["peak_bytes"]
        table.add_row(
            *(f"{case[name]:.0%}" for name in ("mask", "hit_share", "loss_share")),
            f"{case['speedup']:.2f}x",
            f"{case['memory_ratio']:.2f}x",
            f"{ours_s:.3f} s, {ours_bytes / 2**20:.0f} MiB",
            f"{theirs_s:.3f} s, {theirs_bytes / 2**20:.0f} MiB",
            *(f"{case[f'max_relative_{name}_difference']:.1e}" for name in ("loss", "gradient")),
        )
    Console(width=128).print(table)


if __name__ == "__main__":
    main()
