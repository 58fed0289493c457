"""Compare the EAGLE-3 training step with SpecForge's alone: bench_eagle3.py with one peer.

python benchmarks/peers/bench_specforge.py [--shape cpu|llama-8b] [--backend sdpa] [--json FILE]
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.bench_eagle3 import Settings, add_options, command_words, rounds_of, run
from benchmarks.peers.environments import PEERS
from benchmarks.peers.side_by_side import ROOT

PEER = "specforge"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = ROOT / "outputs/peers" / PEERS[PEER].folder_name
    parser.add_argument("--backend", default="sdpa", help="SpecForge's attention: sdpa, flex_attention or fa")
    parser.add_argument("--peer_folder", type=Path, default=folder, help="folder of SpecForge")
    add_options(parser, hits=["all", "random"])
    options = parser.parse_args()
    settings = Settings({PEER: options.backend}, {PEER: options.peer_folder}, options.threads, rounds_of(options))
    words = [f"--backend={options.backend}", *command_words(options)]
    run(options, settings, shlex.join(["python", "benchmarks/peers/bench_specforge.py", *words]))


if __name__ == "__main__":
    main()
