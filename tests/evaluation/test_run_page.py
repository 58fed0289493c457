"""The report of a run: it holds what its folder holds, needs no network, and obeys nothing that a name contains."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine.evaluation.charts import RIGHT, WIDTH, Bar, Line, line_chart, number, stacked_bars
from engine.evaluation.run_page import bottleneck, run_page, write_run_page
from engine.evaluation.run_record import RunRecord

PARTS = {
    "data": 0.01,
    "target_forward": 0.2,
    "transfer": 0.0,
    "wait_for_target": 0.02,
    "draft_forward": 0.3,
    "backward": 0.5,
    "optimizer": 0.1,
}


def make_run(folder: Path, num_steps: int = 30, **summary: object) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("target:\n  path: some/<model>\n")
    lines = []
    for step in range(1, num_steps + 1):
        line = {"step": step, "loss": 9 / step, "loss_per_step": [1 / step] * 7, "accuracy_per_step": [0.1] * 7, "lr": 1e-4}
        line |= {"tokens_per_s": 100.0, "step_s": 1.0, "parts_s": PARTS, "grad_norm": None if step == 3 else 2.0 * step}
        lines.append(json.dumps(line | {"simulated_acceptance_length": 1.5, "overlap_efficiency": 0.5, "memory_gib": 2.0}))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"step": 31, "lo')
    evaluation = {"step": 20, "acceptance_length": 2.25, "confidence": 0.125, "acceptance_per_depth": [0.5], "num_prompts": 4}
    evaluation["is_kept"] = True
    (folder / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Reader(HTMLParser):
    """Collects the tags and the attributes of a page, and whether its tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.counts: dict[str, int] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attributes
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_whole_and_shows_what_the_run_has_left(tmp_path):
    after = {"acceptance_length": 2.5, "confidence": 0.25, "acceptance_per_depth": [0.5, None], "num_prompts": 4}
    folder = make_run(tmp_path / "a<b>", after=after, left_out=["doc 3"])
    write_run_page([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    read = Reader(page)
    assert not read.open and read.counts["figure"] == 9 and read.counts["polyline"] == 1 + 3 + 3 + 2 + 4
    assert "2.50 ± 0.25" in page and "step 20" in page and "Left out: 1 document," in page
    assert "some/&lt;model&gt;" in page and "a&lt;b&gt;" in page and "<b>some" not in page
    links = [value for name, value in read.attributes if name in ("src", "href")]
    assert not links and "http" not in page and "<script" not in page and "@import" not in page


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path):
    folder = make_run(tmp_path / "run", num_steps=0)
    (folder / "evaluations.jsonl").unlink()
    page = run_page([RunRecord.read(folder)])
    assert "No step has been logged yet" in page and not Reader(page).open
    with pytest.raises(ValueError, match="is not the output_dir of a run"):
        RunRecord.read(tmp_path)


def test_two_runs_are_drawn_in_the_same_charts(tmp_path):
    runs = [RunRecord.read(make_run(tmp_path / name, num_steps)) for name, num_steps in (("one", 30), ("two", 12))]
    page = run_page(runs)
    assert page.count("loss, one") == page.count("loss, two") > 0 and 'stroke-dasharray="6 4"' in page
    assert Reader(page).counts["polyline"] == 2 * (1 + 3 + 3 + 2 + 4)


def test_values_that_only_some_runs_have_are_drawn_where_they_are(tmp_path):
    folder = make_run(tmp_path / "run")
    plain = Reader(run_page([RunRecord.read(folder)])).counts
    keys = ("gpu_power_w", "gpu_utilization", "gpu_temperature_c", "mfu", "joules_per_million_tokens", "gpu_memory_gib")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    written = [line | dict.fromkeys(keys, 0.5) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    held_out = {"step": 10, "acceptance_length": None, "held_out_loss": 2.0, "held_out_loss_per_step": [1.0] * 7}
    held_out |= {"held_out_accuracy_per_step": [0.5] * 7, "held_out_acceptance_length": 1.75}
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(held_out) + "\n")
    page = run_page([RunRecord.read(folder)])
    found = Reader(page).counts
    assert found["figure"] == plain["figure"] + 5, "memory has a chart already"
    assert found["polyline"] == plain["polyline"] + 6 + 2, "and held-out loss and simulated acceptance have a line"
    assert page.count(" hollow") == 6 and "held-out loss: 2 at step 10" in page
    assert "simulated, held-out: 1.75 at step 10" in page and "2.25 ± 0.12" in page, "of the draft that is kept"


BROKEN = (
    "",
    "\x00",
    "[1, 2]\n",
    "{",
    '{"step": "x"}\n',
    '{"step": 1}\n',
    '{"step": 1e400, "depths": 3}\n',
    "[" * 1000 + "\n",
)


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_changes_only_what_is_made_from_it(tmp_path, broken):
    after = {"acceptance_length": 2.5, "acceptance_per_depth": [0.5, None], "num_prompts": 4}
    names = ("samples.jsonl", "work.json", "warnings.jsonl", "bad_steps/step_3_rank_0.json", "checkpoints/step_2/complete.json")
    folder = make_run(tmp_path / "run", after=after)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(broken)
    page = run_page([RunRecord.read(folder)])
    assert not Reader(page).open and Reader(page).counts["polyline"] == 1 + 3 + 3 + 2 + 4
    assert "Speculative decoding" in page and "config.yaml" in page and "step 3, the list cannot be read" in page
    for name in ("metrics.jsonl", "evaluations.jsonl", "summary.json", "config.yaml"):
        (folder / name).write_text(broken)
    assert not Reader(run_page([RunRecord.read(folder)])).open


def test_values_of_an_unexpected_kind_leave_a_note_in_their_section(tmp_path):
    sample = {
        "step": 1,
        "source": "\ud800<b>",
        "prompt": 3,
        "tokens": ["a"],
        "depths": ["<q>"],
        "num_tokens": 1,
        "num_forwards": 1,
    }
    after = {"acceptance_length": 2.5, "acceptance_per_depth": "<u>", "num_prompts": 4}
    folder = make_run(tmp_path / "run", after=after, left_out=3)
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "work.json").write_text('{"device": "cpu", "pieces": [4]}')
    write_run_page([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for name in ("Warnings", "Acceptance", "Replies to held-out prompts", "The least time of a step"):
        assert f"{name} cannot be shown:" in page
    assert not Reader(page).open and "<q>" not in page and "<u>" not in page and Reader(page).counts["polyline"] == 13


def points_of(chart: str) -> list[tuple[float, float]]:
    places, *_ = re.findall(r'<polyline[^>]* points="([^"]*)"', chart)
    return [tuple(map(float, place.split(","))) for place in places.split()]


def test_a_line_is_drawn_to_scale():
    points = points_of(line_chart("x", [Line("a", [0, 5, 10], [0.0, 1.0, 4.0])]))
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[0][1] - points[2][1] == pytest.approx(4 * (points[0][1] - points[1][1]), abs=0.5)
    points = points_of(line_chart("x", [Line("a", [0, 1, 2, 3], [1.0, None, 10.0, 100.0])], log=True))
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)
    assert line_chart("x", [Line("a", [1], [None])]) == line_chart("x", []) == ""


def test_a_long_line_is_thinned_out_but_keeps_its_peaks_and_its_end():
    values = [1.0] * 10_000
    values[4321] = 9.0
    points = points_of(line_chart("x", [Line("a", range(10_000), values)]))
    assert 150 < len(points) <= 400 and points[-1][0] == WIDTH - RIGHT
    assert min(y for _, y in points) == 12, "the peak is at the upper end"
    smooth = re.findall(r'<polyline[^>]* points="([^"]*)"', line_chart("x", [Line("a", range(1000), [0.0, 1.0] * 500)]))[1]
    heights = [float(place.split(",")[1]) for place in smooth.split()]
    assert max(heights) - min(heights) < 12, "a running mean of zeros and ones is about a half"
    chart = line_chart("x", [Line("a", [1, 2, 3], [5.001, 5.002, 5.004])])
    assert "5.001" in chart and "5.002" in chart and line_chart("x", [Line("a", [1], [1e17])])


def test_bars_share_a_scale():
    bars = stacked_bars("x", [Bar("a", [("p", 3), ("q", 1)]), Bar("b", [("p", 2)])], "s")
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bars)]
    assert widths == [75, 25, 50]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (12345, "12,345"), (1.5, "1.5"), (0.0123, "0.0123"), (2e-5, "2.00e-05")])
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": 0.5, "wait_for_target": 0.3}, "data.cache_dir"),
        ({"data": 0.5}, "more ranks for the draft"),
        ({"wait_for_target": 0.5}, "overlap.target_ranks"),
        ({"target_forward": 0.4, "draft_forward": 0.2, "backward": 0.3}, "overlap.placement=colocated"),
        ({}, "more ranks for the draft"),
    ],
)
def test_what_a_step_waits_for_is_named_with_the_option_that_moves_it(changes, named):
    assert named in bottleneck(PARTS | changes, 1.0)
    from_store = bottleneck(PARTS | changes, 1.0, reads_store=True)
    assert "split" not in from_store and "capture" not in from_store
