"""Wait for what other threads and processes do."""

import time
from collections.abc import Callable

HANG_S = 60.0  # only a test that hangs ends after this time


def wait_until(
    has_happened: Callable[[], object],
    limit_s: float = HANG_S,
    can_happen: Callable[[], object] = lambda: True,
    tell: Callable[[], object] = lambda: "",
    pause_s: float = 0.002,
) -> None:
    """Wait until something has happened.

    can_happen: whether it still can, such as that a process is alive. tell: what a failure shows.
    pause_s: between two looks.
    Raises AssertionError once it cannot happen any more, or has not happened within limit_s seconds.
    """
    deadline_s = time.monotonic() + limit_s
    while not has_happened():
        assert can_happen(), f"it cannot happen any more. {tell()}"
        assert time.monotonic() < deadline_s, f"it did not happen within {limit_s:g} s. {tell()}"
        time.sleep(pause_s)
