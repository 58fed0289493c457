"""Show, check or merge stores of hidden states: python launcher/inspect_store.py FOLDER [FOLDER ... --merge_into FOLDER]

Reads every byte and compares it with the checksums written by the capture; --quick checks only
sizes and headers.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.table import Table

from engine.hidden_states.store_format import Manifest, StoreError
from engine.hidden_states.store_reader import MappedShard
from engine.hidden_states.store_upkeep import check_store, merge_stores
from engine.hidden_states.target_files import problems_of_files
from engine.host.telemetry import Telemetry


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("stores", nargs="+", type=Path, metavar="FOLDER", help="written by capture_hidden_states.py")
    parser.add_argument(
        "--merge_into", type=Path, metavar="FOLDER", help="write all shards to a new store; the given stores do not change"
    )
    parser.add_argument("--quick", action="store_true", help="check only sizes and headers")
    return parser.parse_args()


def facts(manifest: Manifest) -> Table:
    """Return a table with a store's contents and size."""
    num_tokens, num_slots = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("num_tokens", "num_slots"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in vars(manifest.contents).items():
        table.add_row(name, str(value))
    table.add_row("documents", f"{manifest.num_documents:,} in {len(manifest.shards):,} shards")
    if manifest.num_left_out:
        table.add_row("left out", f"{manifest.num_left_out:,} documents with non-finite hidden states: {left_out(manifest)}")
    table.add_row("tokens", f"{num_tokens:,}, {num_slots:,} of them slots ({num_slots / max(1, num_tokens):.0%})")
    per_token = manifest.num_bytes / max(1, num_tokens) / 1024
    table.add_row("size", f"{manifest.num_bytes / 2**30:,.2f} GiB, {per_token:.2f} KiB per token")
    return table


def left_out(manifest: Manifest) -> str:
    """Return the numbers of the documents that are left out of training, as text."""
    numbers = [shard.first_document + index for shard in manifest.shards for index in shard.left_out]
    return ", ".join(map(str, numbers))


def inspect(folder: Path, quick: bool, telemetry: Telemetry) -> bool:
    """Print a store's contents and problems; return whether it is complete and intact."""
    manifest = Manifest.read(folder)
    telemetry.note(str(folder), style="bold")
    telemetry.console.print(facts(manifest))
    if quick:
        for shard in manifest.shards:
            MappedShard(folder, manifest.contents, shard)
        problems = problems_of_files(folder, manifest.target_files, reads=False)
        for problem in problems:
            telemetry.note(f"  {problem}")
        return not problems
    with telemetry.progress(manifest.num_bytes, "bytes") as progress:
        check = check_store(folder, lambda done: progress.move_to(done, "bytes"))
    for problem in check.problems:
        telemetry.note(f"  {problem}")
    if check.missing:
        telemetry.note(f"  {check.missing} shards have not been captured yet; run the same capture again")
    telemetry.note(f"  {check.seen} of {len(manifest.shards)} shards are whole, every byte as written")
    num_recorded = len(manifest.target_files)
    if num_recorded:
        telemetry.note(f"  the target's files were compared with {num_recorded} checksums")
    if check.unrecorded:
        telemetry.note(f"  without a checksum in the manifest, so not compared: {', '.join(check.unrecorded)}")
    return not check.problems and not check.missing


def main() -> None:
    arguments = parse_arguments()
    telemetry = Telemetry(speaks=True)
    try:
        if arguments.merge_into:
            merge = merge_stores(arguments.stores, arguments.merge_into)
            telemetry.note(f"{arguments.merge_into}: {merge.manifest.num_documents:,} documents")
            if merge.doubled_shards:
                telemetry.note(f"  {merge.doubled_shards} shards left out, because an earlier store has the same")
            if merge.doubled_documents:
                telemetry.note(f"  {merge.doubled_documents:,} documents occur more than once, and training will use each copy")
            return
        whole = [inspect(folder, arguments.quick, telemetry) for folder in arguments.stores]
    except (StoreError, OSError) as error:
        sys.exit(f"inspect_store.py: {error}")
    if not all(whole):
        sys.exit(1)


if __name__ == "__main__":
    main()
