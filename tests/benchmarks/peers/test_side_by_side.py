"""The verdict on rounds of two sides: what a quiet, a drifting and a busy machine lead to."""

import itertools
import random

import pytest
import torch

from benchmarks.peers.side_by_side import (
    MAX_STEPS_PER_ROUND,
    SPREAD_LIMIT,
    WARM_UP_ROUNDS,
    Rounds,
    Timing,
    check_equal,
    judge,
    steps_per_round,
    time_in_rounds,
)
from benchmarks.peers.side_process import waiting_s

OURS_S = 0.5
THEIRS_S = 2.0
ROUNDS = Rounds(5, 15)


class Machine:
    """A fake machine on which a step of each side takes a known time.

    delays: factors by which successive measurements are slowed down, used in a cycle.
    waited: share of the time for which threads wait for a processor.
    """

    def __init__(self, delays: list[float], waited: float | None = 0.01) -> None:
        self.delays = itertools.cycle(delays)
        self.waited = waited
        self.measured: list[tuple[float, int]] = []

    def side(self, seconds: float):
        def time_steps(num_steps: int) -> Timing:
            self.measured.append((seconds, num_steps))
            warms_up = len(self.measured) <= 2 * WARM_UP_ROUNDS
            delay = 1.0 if warms_up else next(self.delays)
            return Timing(seconds * delay, self.waited)

        return time_steps

    def compare(self, rounds: Rounds = ROUNDS):
        return time_in_rounds([self.side(OURS_S), self.side(THEIRS_S)], rounds)


def test_a_quiet_machine_settles_after_the_least_number_of_rounds():
    generator = random.Random(0)
    machine = Machine([generator.uniform(0.98, 1.02) for _ in range(40)])
    pairs, verdict = machine.compare()
    assert len(pairs) == ROUNDS.least
    assert verdict.median == pytest.approx(THEIRS_S / OURS_S, rel=0.04)
    assert not verdict.too_wide and not verdict.busy and verdict.warning is None


def test_load_that_drifts_between_rounds_cancels():
    # Both sides of a round are slowed down alike. The last rounds take three times as long.
    machine = Machine([1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 2.5, 2.5, 3.0, 3.0])
    pairs, verdict = machine.compare()
    assert pairs[-1][0] == pytest.approx(3 * pairs[0][0])
    assert verdict.ratios == pytest.approx([THEIRS_S / OURS_S] * ROUNDS.least)
    assert verdict.warning is None


def test_a_busy_machine_gets_more_rounds_and_then_a_warning():
    # Bursts meet one side of a round but not the other, so ratios lie between 4/3 and 12.
    machine = Machine([3.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0], waited=0.5)
    pairs, verdict = machine.compare()
    assert len(pairs) == ROUNDS.most
    assert verdict.too_wide and verdict.spread > SPREAD_LIMIT
    assert f"{verdict.spread:.2f}" in verdict.warning
    assert "50%" in verdict.warning and "--threads" in verdict.warning
    record = verdict.record()
    assert record["too_wide"] and record["busy"] and record["spread"] == verdict.spread


def test_a_burst_in_the_first_rounds_is_outvoted_by_more_rounds():
    delays = [4.0, 1.0, 1.0, 3.0] + [1.0] * 40
    pairs, verdict = Machine(delays).compare()
    first = judge(pairs[: ROUNDS.least])
    assert first.too_wide
    assert ROUNDS.least < len(pairs) < ROUNDS.most
    assert not verdict.too_wide and verdict.median == pytest.approx(THEIRS_S / OURS_S)


def test_steady_load_is_reported_although_ratios_agree():
    # Here the load slows down one side only: every round gives the same wrong ratio.
    machine = Machine([2.8, 1.0, 1.0, 2.8], waited=0.45)
    _, verdict = machine.compare()
    assert not verdict.too_wide
    assert verdict.busy and "45%" in verdict.warning


def test_the_side_that_waits_more_decides():
    quiet = [0.0, 0.02]
    busy = [0.16, 0.18]
    pairs = [(OURS_S, THEIRS_S)] * 2
    for waited in ([busy, quiet], [quiet, busy]):
        assert judge(pairs, waited).waited_share == pytest.approx(0.17)
    assert not judge(pairs, [quiet, quiet]).busy


def test_sides_alternate_and_the_faster_one_repeats_its_step():
    machine = Machine([1.0])
    machine.compare(Rounds(2, 2))
    timed = machine.measured[2 * WARM_UP_ROUNDS :]
    assert timed == [(OURS_S, 4), (THEIRS_S, 1), (THEIRS_S, 1), (OURS_S, 4)]
    assert steps_per_round(0.01, 2.0) == MAX_STEPS_PER_ROUND
    assert steps_per_round(2.0, 2.0) == 1


def test_waiting_time_is_the_sum_over_threads(tmp_path):
    for thread, nanoseconds in (("1", 2_000_000_000), ("2", 500_000_000)):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(f"77 {nanoseconds} 5\n", encoding="ascii")
    assert waiting_s(tmp_path) == 2.5
    assert waiting_s(tmp_path / "missing") is None


def test_an_unknown_load_is_not_a_warning():
    _, verdict = Machine([1.0], waited=None).compare()
    assert verdict.waited_share is None and verdict.warning is None


def test_sides_that_differ_are_refused():
    ours = {"losses": torch.tensor([1.0, 2.0]), "fc.weight": torch.ones(3)}
    close = {"losses": torch.tensor([1.0, 2.0 + 1e-6]), "fc.weight": torch.ones(3)}
    differences = check_equal(ours, close, (1e-5, 1e-4))
    assert 0 < differences["max_relative_loss_difference"] < 1e-6
    with pytest.raises(RuntimeError, match="fc.weight by 0.5"):
        check_equal(ours, ours | {"fc.weight": torch.full((3,), 2.0)}, (1e-5, 1e-4))
    with pytest.raises(RuntimeError, match="norm.weight"):
        check_equal(ours, ours | {"norm.weight": torch.ones(1)}, (1e-5, 1e-4))
