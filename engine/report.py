"""What a run leaves behind for a person: the summary at its end, and the same as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from engine.evaluate import AcceptanceReport


@dataclass(frozen=True)
class RunReport:
    """Acceptance on held-out prompts before and after training and with prompt lookup, the time of each stage, the draft's place."""

    output_dir: Path
    stage_s: dict[str, float]
    vocab_coverage: float
    before: AcceptanceReport
    after: AcceptanceReport
    prompt_lookup: AcceptanceReport

    def save(self) -> None:
        """Write `summary.json` into the output folder."""
        content = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        (self.output_dir / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        if self.after.num_prompts:
            console.print(self._table())
        times = ", ".join(f"{name[0].lower()}{name[1:]} {seconds:.0f} s" for name, seconds in self.stage_s.items())
        console.print(f"Time: {times}")
        console.print(f"Draft, ready for SGLang: {self.output_dir / 'draft'}\n\nNext:")
        console.print(f"  python launcher/measure_acceptance.py --draft {self.output_dir / 'draft'} --show")
        console.print("  deepspeed launcher/train.py --ds_config ds_configs/zero3.json --recipe launcher/recipes/llama3.1-8b.yaml")
        console.print("  python launcher/train.py --help")

    def _table(self) -> Table:
        title = f"Acceptance length (tokens per target forward) on {self.after.num_prompts} held-out prompts, greedy"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False)
        table.add_column("drafting", no_wrap=True)
        for heading in ("length", "accepted by depth", "tokens/s", "without", "mismatches"):
            table.add_column(heading, justify="right", no_wrap=True)
        rows = {"untrained draft": self.before, "trained draft": self.after, "prompt lookup": self.prompt_lookup}
        for name, report in rows.items():
            table.add_row(name, *_cells(report))
        return table


def _cells(report: AcceptanceReport) -> list[str]:
    depths = " ".join("-" if share is None else f"{share:.0%}" for share in report.acceptance_per_depth)
    plain = "-" if report.plain_tokens_per_s is None else f"{report.plain_tokens_per_s:.0f}"
    return [f"{report.acceptance_length:.2f}", depths, f"{report.tokens_per_s:.0f}", plain, str(report.mismatches)]
