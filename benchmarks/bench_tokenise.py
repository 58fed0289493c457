"""Measure how fast conversations are tokenised, by number of processes, and loaded from the cache.

    python -m benchmarks.bench_tokenise [--megabytes 40] [--json FILE]

Run from the repository's root. Conversations are drawn at random from the embedded corpus until the
file has the given size. The tokenizer is the embedded target's. `plain` renders in one process into
memory. `found` loads the tokens that an earlier run has cached. `floor` is the rate of the
tokenizer alone: the rendered texts pass through `encode_batch_fast`, one at a time, in one process.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.record import show, write_record
from engine.config.sections import DataSection
from engine.data.cpython_corpus import cpython_conversations
from engine.data.dataset import load_documents
from engine.data.tokenised import tokenise
from launcher.command import EMBEDDED_TARGET


def write_conversations(path: Path, num_bytes: int) -> None:
    conversations = [conversation for conversation, _ in cpython_conversations()]
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            turns = [turn for _ in range(4) for turn in generator.choice(conversations)["conversations"][:2]]
            file.write(json.dumps({"conversations": turns}) + "\n")


def measure(folder: Path, num_bytes: int, workers: tuple[int, ...]) -> list[dict[str, float | str]]:
    path = folder / "chat.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TARGET)
    write_conversations(path, num_bytes)
    section = DataSection()
    rows = []

    def row(name: str, call) -> None:
        start = time.perf_counter()
        documents, report = call()
        seconds = time.perf_counter() - start
        rows.append({"how": name, "seconds": seconds, "tokens/s": report.num_tokens / seconds})
        rows[-1]["MB/s"] = path.stat().st_size / seconds / 1e6

    row("plain", lambda: load_documents([str(path)], tokenizer, section))
    for count in workers:
        cached = replace(section, cache_dir=str(folder / str(count)), workers=count)
        row(f"{count} processes", lambda cached=cached: tokenise([str(path)], tokenizer, cached, builds=True))
    row("found", lambda: tokenise([str(path)], tokenizer, cached, builds=True))
    texts = [tokenizer.apply_chat_template(json.loads(line)["conversations"], tokenize=False) for line in path.open()]
    start = time.perf_counter()
    num_tokens = sum(len(tokenizer.backend_tokenizer.encode_batch_fast([text])[0].ids) for text in texts)
    seconds = time.perf_counter() - start
    rows.append(
        {"how": "floor", "seconds": seconds, "tokens/s": num_tokens / seconds, "MB/s": path.stat().st_size / seconds / 1e6}
    )
    return [{**row, "over floor": row["seconds"] / seconds} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="file to write the figures, machine, versions and commit to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.megabytes * 10**6, tuple(options.workers))
    show(rows, "{:,.2f}")
    write_record(options.json, f"python -m benchmarks.bench_tokenise --megabytes {options.megabytes}", rows)


if __name__ == "__main__":
    main()
