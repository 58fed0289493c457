"""Run every comparison with other trainers, and print one table.

    python benchmarks/peers/run_all.py [--folder outputs/peer_figures] [--part eagle3 block disk first_draft]

The parts are the other scripts of this folder with their default options. Each writes its figures,
with machine, versions and command, to a file of the folder. A part whose file is there is not run
again: delete the file to repeat it, and run a script by itself to choose its options.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from benchmarks.peers.environments import PEERS, ROOT

EAGLE3, BLOCK, DISK, FIRST_DRAFT = "eagle3", "block", "disk", "first_draft"
SCRIPTS = {EAGLE3: "bench_eagle3.py", BLOCK: "bench_block.py", DISK: "bench_disk_bytes.py", FIRST_DRAFT: "time_first_draft.py"}
HEADINGS = ("measured", "trainer", "DraftSpeed", "the trainer", "ratio", "memory")
OURS = "draftspeed"
FULL_MASK = "100%"

Row = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/peer_figures", help="folder of the figures")
    parser.add_argument("--part", choices=SCRIPTS, nargs="+", default=list(SCRIPTS), help="default: all")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for part in options.part:
        path = options.folder / f"{part}.json"
        if not path.exists():
            script = ROOT / "benchmarks/peers" / SCRIPTS[part]
            subprocess.run([sys.executable, str(script), "--json", str(path)], cwd=ROOT, check=True)
    show_figures({part: json.loads((options.folder / f"{part}.json").read_text()) for part in options.part})


def show_figures(figures: dict[str, Any]) -> None:
    """Print one table. figures: what the scripts wrote, by part."""
    table = Table(*HEADINGS)
    for part, content in figures.items():
        for row in ROWS[part](content):
            table.add_row(*row)
    Console(width=180).print(table)


def eagle3_rows(cases: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield tokens per second of the training step."""
    for case in cases:
        what = f"EAGLE-3 step, {case['num_tokens']} tokens, {case['mask']:.0%} assistant"
        ours, theirs = (f"{rate:,.0f} tokens/s" for rate in case["tokens_per_s"])
        yield what, PEERS[case["peer"]].title, ours, theirs, _ratio(case), f"{case['memory_ratio']:.2f}x"


def block_rows(cases: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield tokens per second of the training step of block drafters."""
    for case in cases:
        what = f"{case['method']} step, {case['num_tokens']} tokens, {case['anchors']} blocks of {case['block_size']}"
        ours, theirs = (f"{case['num_tokens'] / seconds:,.0f} tokens/s" for seconds in case["seconds"])
        yield what, PEERS[case["peer"]].title, ours, theirs, _ratio(case), f"{case['memory_ratio']:.2f}x"


def _ratio(case: dict[str, Any]) -> str:
    low, high = case["quartiles"]
    doubt = "" if case["warning"] is None else f" ({case['warning']})"
    return f"{case['speedup']:.2f}x, {low:.2f} to {high:.2f}{doubt}"


def disk_rows(record: dict[str, Any]) -> Iterator[Row]:
    """Yield bytes per token on disk. Trainers that store the same for any mask are compared with all tokens in the mask."""
    rows = record["rows"]
    sizes = {row["trainer"]: row["bytes per token"] for row in rows if row["assistant tokens"] in (FULL_MASK, "any")}
    for name, size in sizes.items():
        if name.startswith(OURS):
            continue
        own = "float8_e4m3" if name.endswith("fp8") else "bfloat16"
        ours = sizes[f"{OURS} {own}"]
        what = f"bytes per token of a store, {own}"
        yield what, name, f"{ours:,.0f}", f"{size:,.0f}", f"{ours / size:.2f}x", ""


def first_draft_rows(record: dict[str, Any]) -> Iterator[Row]:
    """Yield the time from a clone to a trained draft, which only DraftSpeed could be measured for."""
    seconds = {row["stage"]: row["seconds"] for row in record["rows"]}
    draft = record["draft"]
    reached = f"accepts {draft['acceptance_length']:.2f}, {draft['speed']:.2f} times plain decoding"
    yield "clone, installation, first draft", "none runs here", f"{seconds['total']:,.0f} s", "-", reached, ""


ROWS = {EAGLE3: eagle3_rows, BLOCK: block_rows, DISK: disk_rows, FIRST_DRAFT: first_draft_rows}

if __name__ == "__main__":
    main()
