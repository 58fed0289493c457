"""Prepare training data from published sets and files: python launcher/prepare_data.py prepare.sources=[ultrachat,my.jsonl]

Writes train.jsonl, held_out.jsonl and report.json to prepare.output_dir. Every source is read once
and is never held in memory. Duplicate conversations are taken once, and unusable ones are counted
by reason and named. Conversations with the same first question are never in both files.
prepare.weights sets the mixture of the sources, and prepare.max_samples limits the number of
conversations. --sources lists the named sets. Named sets, hub ids and Parquet files need
`pip install 'draftspeed[data]'`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich import box
from rich.table import Table

from engine.config.sections import Config, ConfigError
from engine.conversations.prepare import HELD_OUT, TRAIN, prepare
from engine.conversations.published_sets import SOURCES
from engine.host.telemetry import SECONDS_BETWEEN_LINES, ProgressBar, Telemetry
from launcher.command import make_parser, naming_source, read_config, stopping_at_errors


class OpenEnd:
    """Progress without a known total, printed every `SECONDS_BETWEEN_LINES` seconds."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._last_line = time.perf_counter()

    def move_to(self, done: int, text: str) -> None:
        if time.perf_counter() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            self._telemetry.note(f"  {text}")


@contextmanager
def bar_over(telemetry: Telemetry, total: int, name: str) -> Iterator[ProgressBar | OpenEnd]:
    telemetry.note(name, style="bold")
    if not total:
        yield OpenEnd(telemetry)
        return
    with telemetry.progress(total, name) as bar:
        yield bar


def named_sets() -> Table:
    """Return a table of the named sets of prepare.sources, with their hub ids; fits 80 columns."""
    table = Table("source", "description", box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for source in SOURCES.values():
        config = f"config {source.config}, " if source.config else ""
        table.add_row(source.name, f"{source.about}\n{source.hub_id}, {config}split {source.split}")
    return table


def check_sources(config: Config) -> None:
    """Raise ConfigError if prepare.sources is empty."""
    if not config.prepare.sources:
        problem = "expected at least one source, e.g. [ultrachat,my.jsonl]; --sources lists the named sets"
        raise ConfigError(problem, key="prepare.sources", value=config.prepare.sources)


def next_command(folder: Path, names: list[str]) -> str:
    """Return the command that trains on the files written."""
    options = {TRAIN: "data.train", HELD_OUT: "data.held_out"}
    files = " ".join(f"'{option}=[{folder / name}]'" for name, option in options.items() if name in names)
    return f"deepspeed launcher/train.py --ds_config ds_configs/zero2.json --recipe RECIPE.yaml {files}"


def main() -> None:
    parser = make_parser(__doc__, ("prepare", "data"))
    parser.add_argument("--sources", action="store_true", help="list the sets that prepare.sources accepts by name, and exit")
    arguments = parser.parse_intermixed_args()
    telemetry = Telemetry(speaks=True)
    if arguments.sources:
        telemetry.console.print(named_sets())
        return
    with stopping_at_errors(rank=0), naming_source(arguments):
        config = read_config(arguments)
        check_sources(config)
    with stopping_at_errors(rank=0):
        report = prepare(config, partial(bar_over, telemetry))
    telemetry.console.print(report.table())
    for line in report.lines():
        telemetry.note(line)
    telemetry.note(f"\nNext:\n  {next_command(Path(config.prepare.output_dir), list(report.files))}")


if __name__ == "__main__":
    main()
