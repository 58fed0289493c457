"""What a run prints and writes at its end."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from engine.evaluation.acceptance import AcceptanceReport
from engine.evaluation.report import RunReport, acceptance_table
from engine.serving.draft_kinds import DraftKind

REPORT = AcceptanceReport(
    acceptance_length=2.5,
    acceptance_per_depth=[0.75, None],
    tokens_per_s=300.0,
    plain_tokens_per_s=200.0,
    num_prompts=24,
    num_tokens=1200,
    mismatches=0,
)
BEST = replace(REPORT, acceptance_per_depth=[1.0] * 5, tokens_per_s=123456.0, plain_tokens_per_s=654321.0, num_prompts=480)


def printed(show, width: int = 80) -> str:
    file = io.StringIO()
    show(Console(file=file, width=width))
    return file.getvalue()


def row(report: AcceptanceReport, name: str) -> str:
    """The line of the table that begins with `name`, blanks between its cells made one."""
    lines = printed(lambda console: console.print(acceptance_table({"draft": report}))).splitlines()
    return next(" ".join(line.split()) for line in lines if line.split()[:1] == [name])


def test_a_row_gives_length_depths_rates_and_mismatches():
    assert row(REPORT, "draft") == "draft 2.50 75 - 300 1.50x 0 of 24"
    assert row(REPORT, "none") == "none 1.00 200 1.00x"


def test_the_table_of_five_drafted_tokens_fits_80_columns_even_where_all_are_accepted():
    table = acceptance_table({"untrained draft": replace(BEST, mismatches=480)})
    assert "…" not in printed(lambda console: console.print(table))


def test_what_was_not_measured_is_a_dash():
    untimed = replace(REPORT, plain_tokens_per_s=None, mismatches=None)
    assert row(untimed, "draft") == "draft 2.50 75 - 300 - -"
    assert row(replace(untimed, tokens_per_s=None), "draft") == "draft 2.50 75 - - - -"
    assert row(untimed, "none") == "none 1.00 - -"


@pytest.fixture
def report(tmp_path) -> RunReport:
    return RunReport(tmp_path, {"Reading the data": 1.25}, 0.99, replace(REPORT, acceptance_length=1.0), REPORT, REPORT)


def test_the_summary_names_the_draft_and_what_to_do_next(report):
    text = printed(report.show, width=400)
    assert f"Draft, ready for SGLang and vLLM: {report.output_dir / 'draft'}" in text and "Next:" in text
    assert all(name in text for name in ("untrained draft", "trained draft", "prompt lookup", "reading the data 1 s"))


def test_it_names_the_servers_that_load_the_draft(report):
    only_sglang = DraftKind("DSPARK", None, block_size=7)
    text = printed(lambda console: report.show(console, kind=only_sglang), width=400)
    assert "Draft, ready for SGLang:" in text and "with 2 of the 7 tokens of a block" in text
    assert "ready for" not in printed(lambda console: report.show(console, kind=None), width=400)


def test_a_target_that_ranks_share_is_measured_by_several_ranks(report):
    assert "\n  python launcher/measure_acceptance.py" in printed(report.show, width=400)
    shared = replace(report, after=replace(REPORT, tokens_per_s=None, plain_tokens_per_s=None))
    assert "\n  deepspeed launcher/measure_acceptance.py" in printed(shared.show, width=400)


def test_without_prompts_there_is_no_table(report):
    assert "prompt lookup" not in printed(replace(report, after=replace(REPORT, num_prompts=0)).show, width=400)


def test_the_summary_is_kept_as_json(report):
    report.save()
    content = json.loads(Path(report.output_dir, "summary.json").read_text())
    assert content["before"]["acceptance_length"] == 1.0 and content["after"]["acceptance_length"] == 2.5
    assert content["vocab_coverage"] == 0.99 and content["stage_s"] == {"Reading the data": 1.25}
