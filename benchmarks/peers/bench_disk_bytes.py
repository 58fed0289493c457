"""Compare the bytes per token of hidden states on disk with those of other trainers.

    python benchmarks/peers/bench_disk_bytes.py [--json FILE]

Documents of 512 tokens with the width of an 8B target are written by each trainer, and the sizes of
the files are summed. Peers store the same whatever the share of assistant tokens. DraftSpeed stores
last hidden states only where a loss needs them, so it is measured at several shares.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.bench_store import (
    DOCUMENT_TOKENS,
    PACK_TOKENS,
    PRECISIONS,
    finish,
    make_contents,
    make_documents,
    make_pack,
    write_store,
)
from benchmarks.peers.environments import PEERS, ROOT
from benchmarks.record import show, write_record

MASK_SHARES = (1.0, 0.5, 0.1)
NUM_DOCUMENTS = 4
# Name, peer, how the file was made.
PEER_FORMATS = (
    ("specforge", "specforge", "its format, written by torch.save"),
    ("speculators", "speculators", "its format, written by safetensors"),
    ("speculators_fp8", "speculators", "its quantiser and format, written by safetensors"),
    ("nemo_automodel", "nemo_automodel", "its write_shard, all probabilities"),
    ("nemo_automodel_top_k", "nemo_automodel", "its write_shard, --target-probs-topk 64"),
)


def our_bytes_per_token(dtype: str, mask_share: float) -> float:
    documents = make_documents(PACK_TOKENS, mask_share)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = write_store(folder, documents, make_contents(dtype), make_pack(documents, dtype))
        num_bytes = bytes_of(folder)
        finish(folder, manifest)  # Fails if the store is not complete.
    return num_bytes / PACK_TOKENS


def peer_bytes_per_token(name: str, peer_folder: Path) -> float:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(peer_folder)]), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "benchmarks.peers.write_features", "--peer", name, "--folder", folder]
        subprocess.run([*words, "--documents", str(NUM_DOCUMENTS)], env=environment, check=True)
        return bytes_of(Path(folder)) / (NUM_DOCUMENTS * DOCUMENT_TOKENS)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers_folder", type=Path, default=ROOT / "outputs/peers", help="folder in which peers are installed")
    parser.add_argument("--json", type=Path, help="file to write the rows, machine, versions and commit to")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in PRECISIONS:
        for mask_share in MASK_SHARES:
            rows.append(row(f"draftspeed {dtype}", f"{mask_share:.0%}", our_bytes_per_token(dtype, mask_share), "a store"))
    for name, peer, how in PEER_FORMATS:
        folder = options.peers_folder / PEERS[peer].folder_name
        PEERS[peer].install(folder)
        rows.append(row(name, "any", peer_bytes_per_token(name, folder), how))
    show(rows, "{:,.0f}")
    write_record(options.json, "python benchmarks/peers/bench_disk_bytes.py", rows)


def row(trainer: str, mask_share: str, num_bytes: float, how: str) -> dict[str, Any]:
    return {"trainer": trainer, "assistant tokens": mask_share, "bytes per token": num_bytes, "measured from": how}


if __name__ == "__main__":
    main()
