"""Compare the EAGLE-3 training step with that of other trainers, with the same weights and batch.

    python benchmarks/peers/bench_eagle3.py [--peer specforge speculators nemo_automodel] [--json FILE]

A step consists of the target head, the forward pass and the backward pass. The losses and gradients
of DraftSpeed and a peer are first checked to be equal; then their steps are timed in rounds
(side_by_side.py). Each side runs in a process of its own. DraftSpeed keeps freed host memory for the
next step, as in every run (engine/host/freed_memory.py). Peers run with the options that their
serve_*.py states, and with the attention of `ATTENTION`.

The first run installs each peer from the package index into a separate folder (environments.py).
"""

import argparse
import dataclasses
import itertools
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers.eagle3_task import Task
from benchmarks.peers.environments import PEERS
from benchmarks.peers.side_by_side import FIGURES, ROOT, Rounds, SideCommand, compare, figures_of, write_cases

CPU_BAR = dict(hidden_size=512, intermediate_size=1792, num_heads=8, num_key_value_heads=2, head_dim=64)
LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_heads=32, num_key_value_heads=8, head_dim=128)
SHAPES = {
    "cpu": CPU_BAR | dict(draft_vocab_size=8000, vocab_size=32000, num_tokens=1024),
    "cpu-tiny": CPU_BAR | dict(draft_vocab_size=256, vocab_size=512, num_tokens=128),
    "llama-8b": LLAMA_8B | dict(draft_vocab_size=32000, vocab_size=128256, num_tokens=4096),
}
# Relative tolerances of the losses, and of the gradients per tensor in the Frobenius norm.
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 5e-2)}
# On a CPU, speculators' default, FlexAttention, has no backward pass. NeMo Automodel's alternative,
# flash-attn, needs a GPU.
ATTENTION = {
    "cpu": {"specforge": "sdpa", "speculators": "sdpa", "nemo_automodel": "eager"},
    "cuda": {"specforge": "sdpa", "speculators": "simple_flex_attention", "nemo_automodel": "eager"},
}
# speculators also learns slots whose most likely token is outside the draft vocabulary.
HITS = {"specforge": ("all", "random"), "speculators": ("all",), "nemo_automodel": ("all", "random")}


@dataclass(frozen=True)
class Settings:
    """Settings of a run that do not depend on the case.

    attention: attention of each peer, by the peer's name. folders: folder of its installation.
    """

    attention: dict[str, str]
    folders: dict[str, Path]
    threads: int
    rounds: Rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, nargs="+", default=list(PEERS), help="default: all")
    parser.add_argument(
        "--attention",
        nargs="+",
        default=[],
        metavar="PEER=NAME",
        help="attention of a peer, such as specforge=flex_attention",
    )
    parser.add_argument("--peers_folder", type=Path, default=ROOT / "outputs/peers", help="folder in which peers are installed")
    add_options(parser, hits=["all"])
    options = parser.parse_args()
    attention = ATTENTION[options.device] | dict(pair.split("=", 1) for pair in options.attention)
    folders = {name: options.peers_folder / PEERS[name].folder_name for name in options.peer}
    settings = Settings({name: attention[name] for name in options.peer}, folders, options.threads, rounds_of(options))
    words = ["--peer", *options.peer, *command_words(options)]
    if options.attention:
        words += ["--attention", *options.attention]
    run(options, settings, shlex.join(["python", "benchmarks/peers/bench_eagle3.py", *words]))


def add_options(parser: argparse.ArgumentParser, hits: list[str]) -> None:
    """Add the options that do not depend on the peers. hits: default of `--hits`."""
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-8b" if on_gpu else "cpu")
    add("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    add("--dtype", choices=TOLERANCE, default="bfloat16" if on_gpu else "float32")
    add("--mask", type=float, nargs="+", default=[1.0, 0.5, 0.1], help="shares of assistant tokens")
    add("--tokens", type=int, nargs="+", help="tokens of the document; default: those of the shape")
    add(
        "--also",
        type=tokens_and_mask,
        nargs="+",
        default=[],
        metavar="TOKENS:MASK",
        help="further cases, in addition to every length with every mask",
    )
    add(
        "--hits",
        choices=("all", "random"),
        nargs="+",
        default=hits,
        help="whether the draft vocabulary has every most likely token of the target, or a random part of them",
    )
    add("--rounds", type=int, default=5, help="timed rounds of both sides; a spread needs at least 3")
    add("--max_rounds", type=int, help="timed rounds if the spread is too wide; default: 3 times --rounds")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of a side")
    add("--json", type=Path, help="file for the figures, one object per case; machine and versions go to a second file")


def rounds_of(options: argparse.Namespace) -> Rounds:
    most = 3 * options.rounds if options.max_rounds is None else options.max_rounds
    return Rounds(options.rounds, max(options.rounds, most))


def command_words(options: argparse.Namespace) -> list[str]:
    """Return the words that repeat these options, without local paths."""
    names = ("shape", "device", "dtype", "rounds", "threads")
    words = [f"--{name}={getattr(options, name)}" for name in names]
    if options.max_rounds is not None:
        words.append(f"--max_rounds={options.max_rounds}")
    words += ["--mask", *map(str, options.mask), "--hits", *options.hits]
    if options.tokens:
        words += ["--tokens", *map(str, options.tokens)]
    if options.also:
        words += ["--also", *(f"{num_tokens}:{mask}" for num_tokens, mask in options.also)]
    return words


def run(options: argparse.Namespace, settings: Settings, command: str) -> None:
    """Compare DraftSpeed with every peer in every case, print a table and write the figures."""
    requirements = []
    for name, folder in settings.folders.items():
        PEERS[name].install(folder)
        requirements.append(PEERS[name].requirement)
    about = {"peers": requirements, "attention": settings.attention}
    cases = []
    for task in tasks_of(options):
        cases += compare_with_peers(task, settings)
        if options.json:
            # Written after every task, so that an interrupted run keeps its results.
            write_cases(options.json, cases, command, options.device, about)
    show(cases)
    for case in cases:
        if case["warning"]:
            where = f"{PEERS[case['peer']].title}, {case['num_tokens']} tokens, mask {case['mask']:.0%}"
            print(f"WARNING: {where}: {case['warning']}")


def tasks_of(options: argparse.Namespace) -> list[Task]:
    shape = SHAPES[options.shape]
    where = {"device": options.device, "dtype": options.dtype}
    lengths = options.tokens or [shape["num_tokens"]]
    cases = [*itertools.product(lengths, options.mask), *options.also]
    tasks = []
    for hits, (num_tokens, mask) in itertools.product(options.hits, cases):
        sizes = shape | {"num_tokens": num_tokens}
        tasks.append(Task(**sizes, mask=mask, hits=hits, **where))
    return tasks


def tokens_and_mask(text: str) -> tuple[int, float]:
    num_tokens, mask = text.split(":")
    return int(num_tokens), float(mask)


def compare_with_peers(task: Task, settings: Settings) -> list[dict[str, Any]]:
    """Return one case per peer that computes the loss of this task."""
    ours = SideCommand("draftspeed", "benchmarks.peers.serve_draftspeed", task.to_json(), settings.threads)
    about_task = shares(task)
    cases = []
    for name, folder in settings.folders.items():
        if task.hits not in HITS[name]:
            print(f"{PEERS[name].title} computes another loss with --hits {task.hits}: not compared", flush=True)
            continue
        module = f"benchmarks.peers.serve_{name}"
        theirs = dataclasses.replace(ours, name=name, module=module, attention=settings.attention[name], path=folder)
        case = about_task | compare([ours, theirs], TOLERANCE[task.dtype], settings.rounds)
        case["tokens_per_s"] = [task.num_tokens / seconds for seconds in case["seconds"]]
        show([case])
        cases.append(case)
    return cases


def shares(task: Task) -> dict[str, float]:
    """Return tokens and shares of a task: `mask` of its settings, hits, and tokens with loss.

    A hit is a slot for which the target's most likely token is in the draft vocabulary.
    """
    tensors = task.tensors()
    slots_N = tensors.mask_T.nonzero().flatten() + 1
    best_N = (tensors.last_hidden_TD[slots_N] @ tensors.head_VD.T).argmax(-1)
    hits = tensors.in_draft_V[best_N].float()
    loss_share = hits.sum().item() / task.num_tokens
    return {"num_tokens": task.num_tokens, "mask": task.mask, "hit_share": hits.mean().item(), "loss_share": loss_share}


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("peer", "tokens", "mask", "in draft", *FIGURES, "DraftSpeed", "peer's step")
    for case in cases:
        sides = zip(case["seconds"], case["tokens_per_s"], case["peak_bytes"], strict=True)
        table.add_row(
            PEERS[case["peer"]].title,
            str(case["num_tokens"]),
            f"{case['mask']:.0%}",
            f"{case['hit_share']:.0%}",
            *figures_of(case),
            *(f"{seconds:.3f} s, {rate:,.0f} tokens/s, {size / 2**20:,.0f} MiB" for seconds, rate, size in sides),
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
