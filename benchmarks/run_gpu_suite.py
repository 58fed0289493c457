"""Run all checks and benchmarks that need a GPU within a time limit, the most important ones first.

    python benchmarks/run_gpu_suite.py --minutes 12 --json results/gpu

Run from anywhere in a checkout, on a machine with one GPU, torch 2.11, Triton 3.6 and Transformers
5.17 or later. The parts are listed in benchmarks/gpu_suite/parts.py. Each part runs in a separate
process, so a crash or a hang affects only that part. Each part gets a share of the remaining time,
and later parts share the time that it does not use. `suite.json` in the output folder is rewritten
while the suite runs, so the results so far are kept if it is stopped (Ctrl-C, a kill, a lost
machine).
`suite.log` holds the output of every part.

The exit status is 0 if every part that ran passed, 1 if one failed or ran out of time, and 130 or
143 after a signal. Parts with missing packages are skipped and named at the start.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_suite.parts import PARTS, SuitePart
from benchmarks.gpu_suite.runner import Suite, missing_packages, run_suite

MINIMUM_MINUTES = 0.05


def main() -> int:
    options = parse_options()
    parts = chosen_parts(options.parts)
    suite = Suite(
        folder=options.json,
        device=options.device,
        tiny=options.tiny,
        seconds=60 * options.minutes,
    )
    announce(parts, suite)
    return run_suite(parts, suite)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("--minutes", type=float, default=12.0, help="time limit; default: %(default)s")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("outputs/gpu_suite"),
        metavar="FOLDER",
        help="folder for suite.json and suite.log; default: %(default)s",
    )
    parser.add_argument("--parts", nargs="+", metavar="NAME", help=f"only these parts: {names}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="run every part at shapes small enough for a CPU, to check the suite itself; its times mean nothing",
    )
    options = parser.parse_args()
    if options.minutes < MINIMUM_MINUTES:
        parser.error(f"--minutes {options.minutes}: expected at least {MINIMUM_MINUTES}")
    unknown = sorted(set(options.parts or ()) - {part.name for part in PARTS})
    if unknown:
        parser.error(f"--parts {' '.join(unknown)}: no such part; use {names}")
    if options.json.exists() and not options.json.is_dir():
        parser.error(f"--json {options.json}: is a file; name a folder")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu: add --tiny; the real shapes need a GPU")
    if options.device == "cuda" and not gpu_is_visible():
        parser.error("--device cuda: PyTorch sees no GPU here; use --device cpu --tiny to check the suite itself")
    return options


def gpu_is_visible() -> bool:
    """Return whether PyTorch sees a GPU, without creating a CUDA context in this process."""
    import torch

    return torch.cuda.is_available()


def chosen_parts(names: list[str] | None) -> list[SuitePart]:
    """Return the parts with these names in the suite's order, or all parts if `names` is None."""
    if names is None:
        return list(PARTS)
    return [part for part in PARTS if part.name in names]


def announce(parts: list[SuitePart], suite: Suite) -> None:
    """Print the parts that will run, the time limit, and the missing packages."""
    print(f"{len(parts)} parts in at most {suite.seconds / 60:g} minutes; results in {suite.folder}", flush=True)
    for part in parts:
        missing = missing_packages(part, suite.device)
        note = f"  SKIPPED, not installed: {', '.join(missing)}" if missing else ""
        print(f"  {part.name:<14} {part.title}{note}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
