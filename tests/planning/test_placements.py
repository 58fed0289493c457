"""Placements as computed: what overlap can gain, and the ratio that keeps both sides busy."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.overlap.bridge import Sides
from engine.planning.job import SideTimes
from engine.planning.placements import PlacementPlanner, split_step_s
from tests.planning.test_job import planner

DOCS = Path(__file__).resolve().parents[2] / "docs" / "overlap.md"


def times(target_s: float, draft_s: float, transfer_s: float = 0.0) -> SideTimes:
    return SideTimes(target_s, 0.0, draft_s, 0.0, transfer_s)


@pytest.mark.parametrize(
    ("sides", "side_times", "expected"),
    [
        (Sides(1, 1), times(1.0, 1.0), 1.0),
        (Sides(1, 1), times(3.0, 1.0), 3.0),
        (Sides(1, 3), times(3.0, 1.0), 1.0),
        (Sides(2, 6, 2), times(3.0, 1.0), 1.0),
        (Sides(3, 1), times(1.0, 1.0), 3.0),
        (Sides(1, 1), times(1.0, 0.5, transfer_s=2.0), 2.0),
    ],
)
def test_a_split_step_takes_as_long_as_its_longest_side(sides, side_times, expected):
    assert split_step_s(sides, side_times) == pytest.approx(expected, rel=0.02)


def test_colocated_hides_communication_and_shares_compute():
    both = SideTimes(target_compute_s=3.0, target_traffic_s=2.0, draft_compute_s=1.0, draft_traffic_s=1.0, transfer_s=0.0)
    assert (both.serial_s, both.colocated_s) == (7.0, 5.0)
    slow_links = replace(both, target_traffic_s=6.0)
    assert slow_links.colocated_s == 9.0, "the target's own forward cannot hide its communication"


def test_the_table_of_the_docs_is_what_is_computed():
    table = DOCS.read_text(encoding="utf-8")
    jobs = PlacementPlanner(planner("llama3.3-70b")).compare(64)
    assert [job.placement for job in jobs] == ["colocated", "serial", "split"]
    for job in jobs:
        row = f"| llama3.3-70b | {' | '.join(job.cells)} |"
        assert row in table, row
        assert job.tokens_per_s_per_gpu * job.num_ranks == pytest.approx(job.tokens_per_s)
    assert jobs[2].num_target % 2 == 0 and 0 < jobs[2].num_target < 64


def test_a_measured_share_of_the_peak_replaces_the_assumed_one():
    plans = planner("llama3.1-8b")
    slow = planner("llama3.1-8b")
    slow.assumed = replace(slow.assumed, target_share_of_peak=slow.assumed.share_of_peak / 2)
    before, after = (
        own.fitting(8)[0].side_times(own.fitting(8)[0].counts(own.assumed.documents), own.gpus, own.assumed)
        for own in (plans, slow)
    )
    assert after.target_compute_s == pytest.approx(2 * before.target_compute_s)
    assert after.draft_compute_s == before.draft_compute_s


def test_a_draft_rank_of_a_split_job_holds_no_target():
    plan = planner("llama3.3-70b", "parallel.tp_size=2").fitting(8)[0]
    counts = plan.counts(planner("llama3.3-70b").assumed.documents)
    together = plan.bytes_by_part(counts)
    draft = plan.draft_side_bytes(counts, look_ahead=2)
    target = plan.target_side_bytes(counts)
    assert draft["target's embedding and head"] < 0.1 * together["target"]
    assert target["target"] < together["target"], "without the rows of the head that the draft reads"
    assert sum(draft.values()) < sum(together.values()) and sum(target.values()) < sum(together.values())
