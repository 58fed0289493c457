"""Measure how full packs are, and how long ranks wait for each other, for three kinds of data.

    python -m benchmarks.bench_packing [--documents 40000] [--json FILE]

Run from the repository's root. Document lengths and shares of assistant tokens are drawn from
distributions that resemble each kind of data; see tests/data/test_packing.py.

- `wait`: assistant tokens of the slowest rank of a step, as a multiple of the mean over ranks, with
  one pack per rank. With compaction, the cost of a pack depends on its assistant tokens.
- `as drawn`: packs in the order in which they were drawn. `alike`: in the order in which training
  reads them.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.record import show, write_record
from engine.config.sections import DataSection
from engine.data.packing import alike_steps, pack
from tests.data.test_packing import MIXES, mix, wait

RANKS = (8, 64)


def measure(name: str, count: int) -> dict[str, float | str]:
    lengths, assistant_tokens, max_tokens = mix(name, count)
    start = time.perf_counter()
    packs = pack(lengths, assistant_tokens, max_tokens, np.random.default_rng(1))
    row = {"data": name, "seconds": time.perf_counter() - start, "packs": len(packs)}
    row |= {"documents a pack": count / len(packs), "waste": 1 - lengths.sum() / (len(packs) * max_tokens)}
    assistant_tokens_P = np.array([assistant_tokens[members].sum() for members in packs])
    window = DataSection().balance_steps
    for num_ranks in RANKS:
        order = np.concatenate(list(alike_steps(assistant_tokens_P, 0, num_ranks, window, np.random.default_rng(2))))
        row |= {
            f"wait of {num_ranks}, as drawn": wait(assistant_tokens_P, num_ranks),
            f"wait of {num_ranks}, alike": wait(assistant_tokens_P[order], num_ranks),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=40_000)
    parser.add_argument("--json", type=Path, help="file to write the figures, machine, versions and commit to")
    options = parser.parse_args()
    rows = [measure(name, options.documents) for name in MIXES]
    show(rows)
    write_record(options.json, f"python -m benchmarks.bench_packing --documents {options.documents}", rows)


if __name__ == "__main__":
    main()
