"""Show conversations as training sees them: python launcher/inspect_data.py [--recipe FILE] data.train=chat.jsonl [...]

Prints samples with the assistant tokens in green, the lengths of documents, the share of positions
with loss and what compaction saves by it, and how many of the assistant tokens a draft vocabulary
covers. Reads the target's tokenizer and configuration, not its weights. With target.store=FOLDER it
shows the conversations of a store.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from engine.config.block_sections import depth_name
from engine.config.sections import Config
from engine.data.corpus import read_documents
from engine.data.dataset import Bad, UnusableData
from engine.data.dataset_stats import VOCAB_SIZES, Bin, DatasetStats, compute_stats, histogram
from engine.data.dataset_stats_page import Run, write_page
from engine.data.documents import Document
from engine.data.segments import segments_of, write_segments
from engine.data.templates import load_tokenizer
from engine.hidden_states.sources import open_source
from engine.host.files import write_json, write_text
from engine.host.telemetry import Telemetry, visible
from engine.models.method_registry import make_method
from engine.parallel.mesh import World
from engine.target.configuration import load_target_config
from launcher.command import (
    check_inputs,
    make_parser,
    naming_source,
    read_config,
    run_plugins,
    stopping_at_errors,
    with_paths,
    with_store,
    write_embedded_corpus,
)

BAR_CHARACTERS = 40

Sample = tuple[str, list[Run]]


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, ("target", "data", "draft", "ttt"))
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="documents to print; default 3")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as an HTML page with plots")
    parser.add_argument("--bad", type=Path, metavar="FILE", help="write a list of the conversations that cannot be used")
    parser.add_argument(
        "--samples_json",
        type=Path,
        metavar="FILE",
        help="write all documents as text segments, each marked as assistant text or not",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the statistics as JSON")
    return parser.parse_intermixed_args()


def inspect(config: Config, arguments: argparse.Namespace, telemetry: Telemetry) -> None:
    """Read the conversations, print samples and statistics, and write the requested files.

    Raises ValueError, OSError or ImportError for problems that a user can fix.
    """
    tokenizer = load_tokenizer(config.target, config.data)
    target = load_target_config(config.target)
    method = make_method(config)
    draft = method.derive_config(target, config.target.aux_layers)
    if config.target.store is None:
        data = replace(config.data, max_bad_share=1.0)  # show unusable conversations instead of stopping
        try:
            documents, report = read_documents(data, tokenizer, World.alone(), telemetry)
        except UnusableData as error:
            write_bad(arguments.bad, error.bad, telemetry)
            raise
        write_bad(arguments.bad, report.bad, telemetry)
    else:
        documents = open_source(config, tokenizer, World.alone(), telemetry).documents()
    stats = compute_stats(documents, config.data, method, draft, config.seed)
    count = max(0, min(arguments.samples, len(documents)))
    chosen = [number * len(documents) // count for number in range(count)]
    samples = [sample(index, documents[index], tokenizer) for index in chosen]
    show_samples(samples, telemetry)
    show_stats(stats, depth_name(config.draft.method), telemetry)
    if arguments.samples_json:
        arguments.samples_json.parent.mkdir(parents=True, exist_ok=True)
        write_segments(arguments.samples_json, documents, tokenizer)
        telemetry.note(f"{len(documents):,} documents with their masks: {arguments.samples_json}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, stats.facts())
    if arguments.html:
        title = config.target.store or ", ".join(Path(path).name for path in config.data.train)
        write_page(arguments.html, title, stats, samples)
        telemetry.note(f"Page with plots: {arguments.html}")


def write_bad(path: Path | None, bad: Sequence[Bad], telemetry: Telemetry) -> None:
    """Write all refused conversations, one per line: file:line, reason, detail."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{place}: {reason}: {detail}\n" for place, reason, detail in bad))
        telemetry.note(f"{len(bad):,} unusable conversations listed: {path}")


def sample(index: int, document: Document, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """Return a heading, and the document's text in runs that are assistant text or not."""
    num_assistant_tokens = int(document.assistant_mask.sum())
    heading = f"document {index}: {len(document):,} tokens, {num_assistant_tokens:,} of them assistant tokens"
    runs = [(segment.text, segment.assistant) for segment in segments_of(document, tokenizer)]
    return heading, runs


def show_samples(samples: Sequence[Sample], telemetry: Telemetry) -> None:
    for heading, runs in samples:
        telemetry.console.rule(heading)
        telemetry.console.print(
            Text.assemble(*((visible(text), "green" if is_assistant else "dim") for text, is_assistant in runs))
        )


def show_stats(stats: DatasetStats, unit: str, telemetry: Telemetry) -> None:
    """Print the statistics. unit: what each share of rows with loss belongs to, such as a TTT step."""
    show_histogram("tokens per document", histogram(stats.lengths), "{:,.0f}", telemetry)
    shares = histogram(stats.assistant_tokens / stats.lengths, within=(0, 1))
    show_histogram("share of assistant tokens per document", shares, "{:.0%}", telemetry)
    telemetry.console.rule()
    share = stats.assistant_tokens.sum() / stats.num_tokens
    telemetry.note(f"{stats.num_tokens:,} tokens in {len(stats.lengths):,} documents, {share:.1%} of them assistant tokens")
    of = f" (in a sample of {stats.num_sampled:,} documents)" if stats.num_sampled < len(stats.lengths) else ""
    telemetry.note(f"positions with loss by {unit}{of}: {' '.join(f'{share:.1%}' for share in stats.rows_S)}")
    telemetry.note(f"compaction reduces the draft's FLOPs {stats.saving:.2f}x; it saves most where few positions carry loss")
    telemetry.note(f"{stats.num_packs:,} packs of {stats.max_tokens:,} tokens per epoch, {stats.waste:.2%} of positions empty")
    covered = ", ".join(f"{size // 1000}k: {stats.coverage(size):.2%}" for size in VOCAB_SIZES)
    telemetry.note(f"share of assistant tokens that a draft vocabulary covers, by its size: {covered}")


def show_histogram(title: str, bins: Sequence[Bin], number: str, telemetry: Telemetry) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for low, high, count in bins:
        bar = "█" * round(BAR_CHARACTERS * count / max(count for *_, count in bins))
        table.add_row(f"{number.format(low)} to {number.format(high)}", f"{count:,}", bar)
    telemetry.console.rule()
    telemetry.console.print(table)


def main() -> None:
    arguments = parse_arguments()
    with stopping_at_errors(rank=0), naming_source(arguments):
        config = read_config(arguments)
        if config.target.store is None:
            check_inputs(config)
    with TemporaryDirectory() as folder, stopping_at_errors(rank=0):
        corpus = Path(folder) / "corpus"
        run_plugins(config.target.plugins)
        resolved = with_paths(config, corpus)
        if config.target.store is None:
            write_embedded_corpus(config.data.train, corpus)
        else:
            resolved = with_store(resolved)
        inspect(resolved, arguments, Telemetry(speaks=True))


if __name__ == "__main__":
    main()
