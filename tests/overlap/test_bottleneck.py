"""Where the time of a step goes, from made-up times."""

import pytest

from engine.overlap.bottleneck import (
    DRAFT_ITSELF,
    ONE_AFTER_THE_OTHER,
    WAITS_FOR_DATA,
    WAITS_FOR_TARGET,
    find_bottleneck,
    time_shares,
)
from engine.overlap.step_clock import PARTS


def parts(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, 0.0) | seconds


SERIAL = parts(data=0.1, target_forward=0.3, draft_forward=0.2, backward=0.3, optimizer=0.05)
OVERLAPPED = parts(data=0.2, target_forward=0.9, wait_for_target=0.3, draft_forward=0.3, backward=0.3)


def test_the_shares_of_a_step_add_up():
    serial = time_shares(SERIAL, 1.0)
    assert not serial.overlaps and serial.target == 0.3 and serial.waiting == 0.1
    assert serial.target + serial.draft + serial.waiting + serial.rest == pytest.approx(1)
    overlapped = time_shares(OVERLAPPED, 1.0)
    assert overlapped.overlaps and overlapped.target == 0.9 and overlapped.waiting == 0.3
    assert overlapped.draft + overlapped.waiting + overlapped.rest == pytest.approx(1)


def test_a_known_placement_is_not_guessed():
    short = parts(target_forward=0.4, draft_forward=0.3, backward=0.2)
    assert find_bottleneck(short, 1.0) == find_bottleneck(short, 1.0, placement="stored") == ONE_AFTER_THE_OTHER
    assert find_bottleneck(short, 1.0, placement="split") == DRAFT_ITSELF
    assert time_shares(short, 1.0, "colocated").overlaps and not time_shares(short, 1.0, "stored").overlaps
    assert find_bottleneck(OVERLAPPED | {"wait_for_target": 0.0}, 1.0, placement="serial") == ONE_AFTER_THE_OTHER
    assert not time_shares(OVERLAPPED, 1.0, "serial").overlaps


@pytest.mark.parametrize(
    ("seconds", "reads_store", "expected"),
    [
        (SERIAL, False, ONE_AFTER_THE_OTHER),
        (SERIAL, True, WAITS_FOR_DATA),
        (OVERLAPPED, False, WAITS_FOR_TARGET),
        (OVERLAPPED, True, WAITS_FOR_DATA),
        (OVERLAPPED | {"data": 0.95}, False, WAITS_FOR_DATA),
        (OVERLAPPED | {"wait_for_target": 0.05}, False, DRAFT_ITSELF),
        (parts(data=0.5, target_forward=0.05, draft_forward=0.4), False, WAITS_FOR_DATA),  # nothing is read ahead
        (parts(data=0.5, target_forward=0.05, draft_forward=0.9), False, DRAFT_ITSELF),  # it is, in time
    ],
)
def test_the_bottleneck_is_what_a_step_waits_for(seconds, reads_store, expected):
    assert find_bottleneck(seconds, 1.0, reads_store) == expected
