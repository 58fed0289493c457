"""The page of a benchmark of servers."""

import re

from engine.evaluation.page_serving import serving_page
from engine.serving.endpoint import ServedAcceptance, ServedReply
from engine.serving.request_load import LoadResult
from engine.serving.serving_results import PLAIN, Ratio, ServingCell


def cell(setting: str, batch: int, seconds: float, prompts: str = "chat", **rest) -> ServingCell:
    repeats = [LoadResult([ServedReply((1, 2, 3, 4), 0.1, 0.5)], one) for one in (seconds, 2 * seconds)]
    return ServingCell(setting, None, prompts, batch, repeats, **rest)


def test_charts_have_a_line_per_setting_over_batch_size():
    drafted = {"acceptance": ServedAcceptance(2.5, 3), "mismatches": 1, "num_compared": 2, "speed_up": Ratio(1.6, 1.5, 1.7)}
    cells = [cell(PLAIN, 1, 1.0), cell(PLAIN, 8, 0.5), cell("<draft>", 1, 0.5, **drafted), cell("<draft>", 8, 0.25, **drafted)]
    page = serving_page("title & more", "subtitle", cells)
    assert page.count("<figure>") == 5 and "title &amp; more" in page
    assert "<draft>" not in page and "http" not in page.replace("http-equiv", ""), "names are escaped, and nothing is loaded"
    throughput, speed_up = page.split("</figure>")[:2]
    assert throughput.count("<polyline") == 2 and throughput.count("<polygon") == 2, "the range of the repeats is a band"
    assert re.findall(r": ([\d.]+) at batch size (\d)<", throughput) == [("3", "1"), ("6", "8"), ("6", "1"), ("12", "8")]
    assert speed_up.count("<polyline") == 1, "the server without a draft has no speed-up"
    assert "1.60 (1.50 to 1.70)" in page and "1 of 2" in page
    assert "ended early" not in page


def test_sets_of_prompts_have_sections_and_an_early_end_is_told():
    page = serving_page("title", "subtitle", [cell(PLAIN, 1, 1.0), cell(PLAIN, 1, 1.0, "code")], is_complete=False)
    assert page.count("<h2>") == 2 and "Prompts of code" in page
    assert "ended early" in page
