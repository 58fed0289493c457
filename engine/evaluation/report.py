"""The report of a run: the summary printed at its end, which is also written as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from engine.config.sections import DRAFT
from engine.evaluation.acceptance import AcceptanceReport
from engine.evaluation.grid import part_of_block
from engine.host.files import write_json
from engine.serving.draft_kinds import EAGLE3, DraftKind

PAGE = "report.html"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class RunReport:
    """Results of a run: acceptance on held-out prompts, time per stage, and the output folder.

    stage_s: seconds per stage. vocab_coverage: share of the counted tokens in the draft vocabulary.
    before, after, prompt_lookup: acceptance of the untrained draft, the trained draft and prompt
    lookup; None if the target was not loaded, because nothing could be decoded.
    left_out: names of the documents that were excluded because their states are not finite.
    """

    output_dir: Path
    stage_s: dict[str, float]
    vocab_coverage: float
    before: AcceptanceReport | None = None
    after: AcceptanceReport | None = None
    prompt_lookup: AcceptanceReport | None = None
    left_out: tuple[str, ...] = ()

    def save(self) -> None:
        """Write `summary.json` into the output folder. Raises WriteError."""
        content = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        write_json(self.output_dir / SUMMARY, content)

    def show(self, console: Console, flags: Sequence[str] = (), kind: DraftKind | None = EAGLE3) -> None:
        """Print the results and the next commands.

        flags: that a command needs to measure the draft. kind: of the draft; None = no server knows it.
        """
        if self.after is not None and self.after.num_prompts:
            named = {"untrained draft": self.before, "trained draft": self.after, "prompt lookup": self.prompt_lookup}
            reports = {name: report for name, report in named.items() if report is not None}
            console.print(acceptance_table(reports))
            partly = None if kind is None else part_of_block(len(self.after.acceptance_per_depth), kind)
            if partly is not None:
                console.print(partly)
        times = ", ".join(f"{name[0].lower()}{name[1:]} {seconds:.0f} s" for name, seconds in self.stage_s.items())
        console.print(f"Time: {times}")
        if self.left_out:
            console.print(
                f"Left out because the target's states are not finite: {len(self.left_out)} documents, listed in {SUMMARY}"
            )
        ready = "Draft" if kind is None else f"Draft, ready for {kind.servers}"
        console.print(f"{ready}: {self.output_dir / DRAFT}\nReport: {self.output_dir / PAGE}\n\nNext:")
        timed = self.after is None or self.after.num_prompts == 0 or self.after.tokens_per_s is not None
        # A target that was not timed may need all ranks.
        start = "python" if timed else "deepspeed"
        option = "".join(f" {flag}" for flag in flags)
        console.print(f"  {start} launcher/measure_acceptance.py --draft {self.output_dir / DRAFT} --show{option}")
        console.print(
            "  deepspeed launcher/train.py --ds_config ds_configs/zero2.json --recipe launcher/recipes/llama3.1-8b.yaml "
            "data.train=YOURS.jsonl data.held_out=HELD_OUT.jsonl"
        )
        console.print("  python launcher/train.py --help")


def acceptance_table(reports: dict[str, AcceptanceReport], replies: str = "Greedy decoding") -> Table:
    """Return a table of acceptance and speed per way of drafting, next to plain decoding.

    replies: how they were decoded, for the title.

    It fits 80 columns with five drafted tokens.
    """
    some = next(iter(reports.values()))
    table = Table(
        title=f"{replies} of {some.num_prompts} held-out prompts, {some.num_tokens} tokens",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("drafting", no_wrap=True)
    for heading in ("acceptance\nlength", "accepted %\nby depth", "tokens/s", "speed", "unlike\ngreedy"):
        table.add_column(heading, justify="right", no_wrap=True)
    # Each speed is relative to the plain decoding that was timed next to it; the first row shows the last of these.
    *_, latest = reports.values()
    table.add_row("none", "1.00", "", _rate(latest.plain_tokens_per_s), "1.00x" if latest.plain_tokens_per_s else "-", "")
    for name, report in reports.items():
        speed = "-"
        if report.tokens_per_s is not None and report.plain_tokens_per_s:
            speed = f"{report.tokens_per_s / report.plain_tokens_per_s:.2f}x"
        differs = "-" if report.mismatches is None else f"{report.mismatches} of {report.num_prompts}"
        table.add_row(name, report.length_text, report.depths_text, _rate(report.tokens_per_s), speed, differs)
    return table


def _rate(tokens_per_s: float | None) -> str:
    return f"{tokens_per_s:.0f}" if tokens_per_s else "-"
