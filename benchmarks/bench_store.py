"""Measure how fast a store is written and read, next to the raw rates of the disk, by precision.

    python -m benchmarks.bench_store --folder /where/the/disk/is [--tokens 16384] [--json FILE]

Run from the repository's root. Random hidden states with the width of an 8B target are written
through the queue and threads of a capture, including fsync. They are read back in shuffled packs of
8192 tokens, including checksums, as training reads them to the host.

- `cold`: the files' pages are dropped from the page cache first.
- `disk`: raw rates of one thread that writes (then syncs) and reads the same number of bytes in
  order.
- `loop s, N ahead`: seconds of a loop that reads each pack up to N packs ahead, and sleeps as long
  as reading a pack takes, in place of a GPU's step.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.record import show, write_record
from engine.batch import TargetOutput
from engine.config.sections import AHEAD_OF_STORE, TttSection
from engine.data.documents import Document
from engine.data.packed_loader import PackedLoader
from engine.data.packing import collate
from engine.hidden_states.store_format import HEAD, MANIFEST, TARGET_FOLDER, Contents, Layout, Manifest, plan_shards
from engine.hidden_states.store_reader import open_store
from engine.hidden_states.store_writer import Piece, ShardFile, StoredTensors, StoreWriter
from engine.hidden_states.stored_target import StoredTarget
from engine.host.freed_memory import keep_freed_memory
from engine.models.training_rows import allowed_rows, slots_of
from tests.pipelines import prepared

HIDDEN = 4096
DOCUMENT_TOKENS = 512
PACK_TOKENS = 8192
CHUNK = 8 << 20
PRECISIONS = ("bfloat16", "float8_e4m3")
THREADS = 4
ROUNDS = 3


def make_documents(num_tokens: int, mask_share: float = 0.5) -> list[Document]:
    """Return documents of 512 tokens each.

    mask_share: share of assistant tokens, which are the last ones of each document.
    """
    ids_T = np.random.default_rng(0).integers(0, 1000, num_tokens).astype(np.int32)
    mask_T = np.arange(DOCUMENT_TOKENS) >= round(DOCUMENT_TOKENS * (1 - mask_share))
    return [Document(ids_T[at : at + DOCUMENT_TOKENS], mask_T, ()) for at in range(0, num_tokens, DOCUMENT_TOKENS)]


def make_contents(dtype: str) -> Contents:
    hashes = {"config_hash": "", "tokenizer_hash": "", "template_hash": ""}
    sizes = {"aux_layers": (1, 2, 3), "hidden_size": HIDDEN, "vocab_size": 1000}
    return Contents("random", None, **hashes, **sizes, mask_alignment="inference", temperature=1.0, dtype=dtype)


def make_pack(pack: list[Document], dtype: str) -> dict[str, torch.Tensor]:
    """Return the tensors that a capture writes for one pack."""
    slots_N = slots_of(allowed_rows(collate(pack), TttSection()))
    states_TD = torch.randn(PACK_TOKENS, HIDDEN).bfloat16()
    few_N = torch.zeros(len(slots_N))
    output = TargetOutput(states_TD.repeat(1, 3), slots_N, states_TD[: len(slots_N)], few_N.int(), few_N)
    return StoredTensors.of(collate(pack), output, dtype).tensors


def write_store(folder: Path, documents: list[Document], contents: Contents, tensors: dict[str, torch.Tensor]) -> Manifest:
    """Write a store as a capture does, with the given tensors in place of the target's output."""
    ttt = TttSection()
    pack = documents[: PACK_TOKENS // DOCUMENT_TOKENS]
    slots_N = slots_of(allowed_rows(collate(pack), ttt))
    shards = plan_shards([DOCUMENT_TOKENS] * len(documents), [len(slots_N) // len(pack)] * len(documents), contents, 256 << 20)
    writer = StoreWriter(THREADS, depth=2 * THREADS)
    for shard in shards:
        file = ShardFile(folder, contents, shard)
        for first in range(0, shard.num_documents, len(pack)):
            own = [documents[index] for index in shard.documents][first : first + len(pack)]
            batch = collate(own)
            own_slots_N = slots_of(allowed_rows(batch, ttt))
            rows = {n: x[: batch.num_tokens if n.startswith("aux") else len(own_slots_N)] for n, x in tensors.items()}
            start = first * DOCUMENT_TOKENS, first * len(slots_N) // len(pack)
            no_faults = torch.zeros(len(own), 5, dtype=torch.bool)
            writer.put(Piece(file, first, *start, batch, own_slots_N, rows, no_faults))
    writer.close()
    return Manifest(contents, "", shards)


def finish(folder: Path, manifest: Manifest) -> None:
    """Write the files that, together with the shards, make a complete store."""
    text = manifest.to_json()
    (folder / TARGET_FOLDER).mkdir()
    (folder / TARGET_FOLDER / "config.json").write_text("{}", encoding="utf-8")
    head = {"embed": torch.zeros(1000, HIDDEN).bfloat16()}
    save_file(head, folder / TARGET_FOLDER / HEAD, metadata={"head": json.dumps({"scale": 1.0, "soft_cap": None})})
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_store(folder: Path) -> None:
    opened = open_store(folder, skip_bad=True)
    target = StoredTarget(opened, torch.device("cpu"))
    sizes = {"packs_per_batch": 1, "rank": 0, "world_size": 1, "accumulation_steps": 1, "balance_steps": 8}
    for (batch,), _ in PackedLoader(opened.documents, max_tokens=PACK_TOKENS, **sizes, seed=0, epochs=1):
        target.read(batch, slots_of(allowed_rows(batch, TttSection())))


def train_from_store(folder: Path, ahead: int, step_s: float) -> float:
    """Return the seconds of a loop that reads each pack and then sleeps for the time of a step.

    ahead: packs to read ahead. step_s: seconds of a step.
    """
    opened = open_store(folder, skip_bad=True)
    target = StoredTarget(opened, torch.device("cpu"))
    sizes = {"packs_per_batch": 1, "rank": 0, "world_size": 1, "accumulation_steps": 1, "balance_steps": 8}
    loader = PackedLoader(opened.documents, max_tokens=PACK_TOKENS, **sizes, seed=0, epochs=1)

    def read(item: tuple) -> None:
        (batch,), _ = item
        target.read(batch, slots_of(allowed_rows(batch, TttSection())))

    start = time.perf_counter()
    for _ in prepared(loader, read, ahead):
        time.sleep(step_s)
    return time.perf_counter() - start


def write_plainly(path: Path, num_bytes: int) -> None:
    chunk = os.urandom(CHUNK)
    with path.open("wb", buffering=0) as file:
        for at in range(0, num_bytes, CHUNK):
            file.write(chunk[: num_bytes - at])
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    room = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(room):
            pass


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(work: Callable[[], object], num_bytes: int) -> float:
    """Return the rate of `work` in MB/s, if it processes `num_bytes` bytes."""
    start = time.perf_counter()
    work()
    return num_bytes / (time.perf_counter() - start) / 1e6


def measure(parent: Path, dtype: str, num_tokens: int) -> dict[str, float]:
    """Run one round and return its rates in MB/s, loop times in s, and KiB per token."""
    documents = make_documents(num_tokens)
    contents = make_contents(dtype)
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name) / "store"
        plain = Path(name) / "plain"
        folder.mkdir()
        tensors = make_pack(documents[: PACK_TOKENS // DOCUMENT_TOKENS], dtype)
        start = time.perf_counter()
        manifest = write_store(folder, documents, contents, tensors)
        seconds = time.perf_counter() - start
        num_bytes = sum(Layout.of(contents, shard).num_bytes for shard in manifest.shards)
        finish(folder, manifest)
        rates = {
            "store write": num_bytes / seconds / 1e6,
            "disk write": rate(lambda: write_plainly(plain, num_bytes), num_bytes),
        }
        for where in ("cold", "warm"):
            for what, work in (("store", lambda: read_store(folder)), ("disk", lambda: read_plainly(plain))):
                if where == "cold":
                    drop_from_cache(Path(name))
                rates[f"{what} read, {where}"] = rate(work, num_bytes)
        # Reading ahead gains most if a step takes as long as reading its pack.
        step_s = num_bytes / 1e6 / rates["store read, cold"] / (num_tokens / PACK_TOKENS)
        for ahead in (0, AHEAD_OF_STORE):
            drop_from_cache(Path(name))
            rates[f"loop s, {ahead} ahead"] = train_from_store(folder, ahead, step_s)
    return rates | {"KiB a token": num_bytes / num_tokens / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to measure")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the store; a multiple of 8192")
    parser.add_argument("--json", type=Path, help="file to write the rates, machine, versions and commit to")
    options = parser.parse_args()
    keep_freed_memory()
    largest = make_contents("bfloat16").bytes_per_token * 2 * options.tokens
    if options.tokens % PACK_TOKENS or shutil.disk_usage(options.folder).free < largest:
        parser.error(
            f"--tokens {options.tokens}: expected a multiple of {PACK_TOKENS} for which {options.folder} has space twice"
        )
    rows = []
    for dtype in PRECISIONS:
        rounds = [measure(options.folder, dtype, options.tokens) for _ in range(ROUNDS)]
        rows.append({"dtype": dtype} | {name: statistics.median(r[name] for r in rounds) for name in rounds[0]})
    show(rows, "{:,.2f}")
    write_record(options.json, f"python -m benchmarks.bench_store --tokens {options.tokens}", rows)


if __name__ == "__main__":
    main()
