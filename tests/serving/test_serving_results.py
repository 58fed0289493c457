"""Percentiles, ratios and the tables of a benchmark."""

from statistics import quantiles

import pytest
from rich.console import Console

from engine.serving.endpoint import ServedAcceptance, ServedReply
from engine.serving.request_load import LoadResult
from engine.serving.serving_results import PLAIN, Ratio, ServingCell, latency_table, percentiles, speed_table


def cell(setting: str, seconds: list[float], **rest) -> ServingCell:
    """Two replies of 5 tokens per repeat."""
    replies = [ServedReply((1, 2, 3, 4, 5), 0.1, 0.5), ServedReply((1, 2, 3, 4, 5), 0.2, 1.0)]
    return ServingCell(setting, None, rest.pop("prompts", "chat"), 2, [LoadResult(replies, one) for one in seconds], **rest)


def test_percentiles_are_those_of_the_standard_library():
    values = [0.3, 0.1, 0.7, 0.2, 0.9, 0.4]
    expected = quantiles(values, n=100, method="inclusive")
    assert percentiles(values) == pytest.approx({share: expected[share - 1] for share in (50, 90, 99)})
    assert percentiles([2.0]) == {50: 2.0, 90: 2.0, 99: 2.0}


def test_a_ratio_has_the_range_of_all_pairs_of_repeats():
    ratio = Ratio.of([20.0, 30.0, 24.0], [10.0, 12.0, 8.0])
    assert (ratio.middle, ratio.low, ratio.high) == (2.4, 20 / 12, 30 / 8)


def test_tables_have_a_row_per_setting():
    ratio = Ratio(1.5, 1.25, 1.75)
    acceptance = ServedAcceptance(2.375, 7)
    cells = [
        cell(PLAIN, [2.0, 1.0, 4.0], mismatches=0, num_compared=4),
        cell("a chain of 3", [1.0, 1.0, 1.0], acceptance=acceptance, mismatches=1, num_compared=6, speed_up=ratio),
    ]
    console = Console(width=80, record=True)
    console.print(speed_table(cells, "title"))
    console.print(latency_table(cells))
    text = " ".join(console.export_text().split())
    assert "no draft 2 5.0 1.00 - 0/4 -" in text
    assert "a chain of 3 2 10.0 2.00 2.38 1/6 1.50x (1.25-1.75)" in text
    assert "150.0 200.0 200.0 750.0 1,000.0 1,000.0" in text, "times of all repeats"
    console.print(speed_table([*cells, cell(PLAIN, [1.0], prompts="[code]")], "title"))
    assert "[code]" in console.export_text(), "several sets of prompts are told apart"
    assert cells[1].to_dict()["speed_up"] == {"ratio": 1.5, "low": 1.25, "high": 1.75}
