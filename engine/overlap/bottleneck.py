"""Judgement of where the time of a training step goes, and of what would shorten it."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.sections import COLOCATED, SERIAL, SPLIT
from engine.overlap.step_clock import DATA, TARGET_FORWARD, TRANSFER, WAIT, draft_seconds

# What a step waits for most.
WAITS_FOR_DATA = "data"
WAITS_FOR_TARGET = "target"
ONE_AFTER_THE_OTHER = "serial"
DRAFT_ITSELF = "draft"

ADVICE = {
    WAITS_FOR_DATA: (
        "The draft waits for data: put the store or data.cache_dir on a faster disk, or raise overlap.look_ahead."
    ),
    WAITS_FOR_TARGET: (
        "The draft waits for the target: give it more ranks (overlap.placement=split with a larger overlap.target_ranks), "
        "share it (parallel.tp_size), or capture its hidden states once if there are several epochs."
    ),
    ONE_AFTER_THE_OTHER: (
        "Target and draft run one after the other: overlap.placement=colocated or split would hide the shorter one."
    ),
    DRAFT_ITSELF: "The draft's own forward and backward are the longest part: more ranks for the draft shorten a step.",
}
MEASURING_ERROR = 1.1  # parts that run one after the other may add up to this multiple of the step
LONG_WAIT = 0.1  # share of a step
LONG_PREPARATION = 0.2  # share of a step


@dataclass(frozen=True)
class TimeShares:
    """Shares of a step's time, from 0 to 1.

    target: forward of the target. draft: its forward, backward and optimizer.
    waiting: time in which the draft waits for data or for the target. rest: none of these.
    overlaps: whether the target runs at the same time as the draft. The shares other than its own
    then add up to 1.
    """

    target: float
    draft: float
    waiting: float
    rest: float
    overlaps: bool


def _overlaps(placement: str | None) -> bool | None:
    """Return whether the target runs at the same time as the draft; None = the placement does not say."""
    if placement in (COLOCATED, SPLIT):
        return True
    return False if placement == SERIAL else None


def time_shares(parts_s: Mapping[str, float], step_s: float, placement: str | None = None) -> TimeShares:
    """Return the shares of a step's time.

    parts_s: mean seconds of each part. step_s: of a step, above 0.
    placement: `serial`, `colocated`, `split` or `stored`; None = unknown, and judged by the sum of the parts.
    """
    target = parts_s[TARGET_FORWARD] / step_s
    draft = draft_seconds(parts_s) / step_s
    reading = parts_s[DATA] / step_s
    waiting = parts_s[WAIT] / step_s
    overlaps = _overlaps(placement)
    if overlaps is None:
        overlaps = target + reading + parts_s[TRANSFER] / step_s + waiting + draft > MEASURING_ERROR
    if not overlaps:  # nothing is read ahead
        waiting += reading
    exposed = 0.0 if overlaps else target
    return TimeShares(target, draft, waiting, max(0.0, 1 - draft - waiting - exposed), overlaps)


def find_bottleneck(
    parts_s: Mapping[str, float], step_s: float, reads_store: bool = False, placement: str | None = None
) -> str:
    """Return what a step waits for most, a key of `ADVICE`.

    parts_s: mean seconds of each part. reads_store: whether hidden states are read from a store.
    placement: as in `time_shares`.
    """
    data_s = parts_s[DATA]
    target_s = parts_s[TARGET_FORWARD]
    is_waiting = parts_s[WAIT] > LONG_WAIT * step_s
    reads_longest = data_s > max(target_s, LONG_PREPARATION * step_s)
    prepared_s = target_s + data_s if reads_longest else target_s
    is_long = prepared_s > LONG_PREPARATION * step_s
    overlaps = _overlaps(placement)
    if overlaps is None:
        overlaps = prepared_s + draft_seconds(parts_s) > MEASURING_ERROR * step_s
    is_serial = is_long and not overlaps
    if (is_waiting or is_serial) and (reads_longest or reads_store):
        return WAITS_FOR_DATA
    if is_waiting:
        return WAITS_FOR_TARGET
    return ONE_AFTER_THE_OTHER if is_serial else DRAFT_ITSELF


def bottleneck(parts_s: Mapping[str, float], step_s: float, reads_store: bool = False, placement: str | None = None) -> str:
    """Return a sentence that names what a step waits for most, and the option that would change it."""
    return ADVICE[find_bottleneck(parts_s, step_s, reads_store, placement)]
