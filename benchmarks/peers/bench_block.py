"""Compare the training step of block drafters with that of other trainers, with the same weights and batch.

    python benchmarks/peers/bench_block.py [--peer specforge speculators] [--method dflash dspark] [--json FILE]

A step consists of the forward pass, the loss, the backward pass and, where the objective needs the
target's distribution, the target's head. The loss and all gradients of DraftSpeed and a peer are
first checked to be equal; then their steps are timed in rounds (side_by_side.py). Each side runs in
a process of its own. Both learn the peer's objective at the same anchors (block_task.py).

The first run installs each peer from the package index into a separate folder (environments.py).
"""

import argparse
import itertools
import os
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers.bench_eagle3 import TOLERANCE, rounds_of
from benchmarks.peers.block_task import DFLASH, DSPARK, METHODS, SPECFORGE, SPECULATORS, BlockTask
from benchmarks.peers.environments import PEERS
from benchmarks.peers.side_by_side import FIGURES, ROOT, SideCommand, compare, figures_of, write_cases

COMPARED = (SPECFORGE, SPECULATORS)
_CPU = dict(hidden_size=512, intermediate_size=1792, num_heads=8, num_key_value_heads=2, head_dim=64)
_QWEN3_8B = dict(hidden_size=4096, intermediate_size=12288, num_heads=32, num_key_value_heads=8, head_dim=128)
SHAPES = {
    "cpu": _CPU
    | dict(num_layers=3, num_aux=3, vocab_size=32000, num_tokens=1024, markov_rank=256, anchors=128)
    | dict(sizes={DFLASH: 8, DSPARK: 7}),
    "cpu-tiny": _CPU
    | dict(num_layers=2, num_aux=2, vocab_size=512, num_tokens=128, markov_rank=16, anchors=8)
    | dict(sizes={DFLASH: 8, DSPARK: 7}),
    "qwen3-8b": _QWEN3_8B
    | dict(num_layers=5, num_aux=5, vocab_size=151936, num_tokens=4096, markov_rank=256, anchors=512)
    | dict(sizes={DFLASH: 16, DSPARK: 7}),
}
LARGE_BLOCK = 16
# Constant of the decay for blocks of fewer rows, and for those of `LARGE_BLOCK` and more.
DECAYS = (4.0, 7.0)
# On a CPU, the default of both, FlexAttention, has no backward pass.
ATTENTION = {
    "cpu": {SPECFORGE: "sdpa", SPECULATORS: "sdpa"},
    "cuda": {SPECFORGE: "flex_attention", SPECULATORS: "simple_flex_attention"},
}


def main() -> None:
    options = read_options()
    commands = dict(pair.split("=", 1) for pair in options.attention)
    attention = {name: (ATTENTION[options.device] | commands)[name] for name in options.peer}
    for name in options.peer:
        PEERS[name].install(folder_of(name, options))
    about = {"peers": [PEERS[name].requirement for name in options.peer], "attention": attention}
    cases: list[dict[str, Any]] = []
    for name, method in itertools.product(options.peer, options.method):
        cases.append(compare_with(make_task(name, method, options), attention[name], options))
        show(cases[-1:])
        if options.json:
            # Written after every comparison, so that an interrupted run keeps its results.
            write_cases(options.json, cases, words_of(options), options.device, about)
    show(cases)
    for case in cases:
        if case["warning"]:
            print(f"WARNING: {PEERS[case['peer']].title}, {case['method']}: {case['warning']}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--peer", choices=COMPARED, nargs="+", default=list(COMPARED), help="default: all")
    add("--method", choices=METHODS, nargs="+", default=list(METHODS), help="default: all")
    add("--attention", nargs="+", default=[], metavar="PEER=NAME", help="attention of a peer, such as specforge=eager")
    add("--peers_folder", type=Path, default=ROOT / "outputs/peers", help="folder in which peers are installed")
    add("--shape", choices=SHAPES, default="qwen3-8b" if on_gpu else "cpu")
    add("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    add("--dtype", choices=TOLERANCE, default="bfloat16" if on_gpu else "float32")
    add("--rounds", type=int, default=5, help="timed rounds of both sides; a spread needs at least 3")
    add("--max_rounds", type=int, help="timed rounds if the spread is too wide; default: 3 times --rounds")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of a side")
    add("--json", type=Path, help="file for the figures, one object per case; machine and versions go to a second file")
    return parser.parse_args()


def words_of(options: argparse.Namespace) -> str:
    """Return the command that repeats this run, without local paths."""
    words = ["python", "benchmarks/peers/bench_block.py", "--peer", *options.peer, "--method", *options.method]
    words += [f"--{name}={getattr(options, name)}" for name in ("shape", "device", "dtype", "rounds", "threads")]
    if options.max_rounds is not None:
        words.append(f"--max_rounds={options.max_rounds}")
    if options.attention:
        words += ["--attention", *options.attention]
    return shlex.join(words)


def folder_of(name: str, options: argparse.Namespace) -> Path:
    return options.peers_folder / PEERS[name].folder_name


def make_task(peer: str, method: str, options: argparse.Namespace) -> BlockTask:
    shape = dict(SHAPES[options.shape])
    block_size = shape.pop("sizes")[method]
    decay = DECAYS[block_size >= LARGE_BLOCK]
    where = {"device": options.device, "dtype": options.dtype}
    return BlockTask(method=method, peer=peer, **shape, block_size=block_size, decay=decay, **where)


def compare_with(task: BlockTask, attention: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of DraftSpeed next to a peer."""
    prefix = "benchmarks.peers.serve_block_"
    text = task.to_json()
    ours = SideCommand("draftspeed", f"{prefix}draftspeed", text, options.threads)
    folder = folder_of(task.peer, options)
    theirs = SideCommand(task.peer, f"{prefix}{task.peer}", text, options.threads, attention, folder)
    figures = compare([ours, theirs], TOLERANCE[task.dtype], rounds_of(options))
    about = {"method": task.method, "anchors": task.anchors, "block_size": task.block_size, "num_tokens": task.num_tokens}
    return figures | about


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("peer", "method", "anchors x rows", *FIGURES, "DraftSpeed", "peer's step")
    for case in cases:
        sides = zip(case["seconds"], case["peak_bytes"], strict=True)
        table.add_row(
            PEERS[case["peer"]].title,
            case["method"],
            f"{case['anchors']} x {case['block_size']}",
            *figures_of(case),
            *(f"{seconds:.3f} s, {size / 2**20:,.0f} MiB" for seconds, size in sides),
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
