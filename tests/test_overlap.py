import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from engine.overlap import run_ahead

CPU = torch.device("cpu")
DEPTHS = (0, 1, 3)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 10 s"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    wait_until(lambda: set(threading.enumerate()) <= before)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_every_item_is_prepared_once_and_comes_in_order(depth, count):
    prepared = []
    results = list(run_ahead(range(count), lambda item: prepared.append(item) or item * item, depth, CPU))
    assert results == [item * item for item in range(count)]
    assert prepared == list(range(count))


@pytest.mark.parametrize("depth", DEPTHS)
def test_preparation_is_never_more_than_depth_items_ahead_and_gets_that_far(depth):
    prepared = []
    work = run_ahead(range(12), lambda item: prepared.append(item) or item, depth, CPU)
    for asked in range(1, 13):
        next(work)
        wait_until(lambda: len(prepared) >= min(12, asked + depth))  # noqa: B023 (called before `asked` moves on)
        time.sleep(0.01)  # time enough for one too many
        assert len(prepared) == min(12, asked + depth)
    assert list(work) == []


@pytest.mark.parametrize("depth", DEPTHS)
def test_nothing_happens_before_the_first_item_is_asked_for(depth):
    prepared = []
    run_ahead(range(3), prepared.append, depth, CPU)
    time.sleep(0.01)
    assert prepared == []


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_in_prepare_is_raised_where_its_result_would_have_been(depth, kind):
    def prepare(item: int) -> int:
        if item == 4:
            raise kind("item 4 is bad")
        return item

    work, seen = run_ahead(range(9), prepare, depth, CPU), []
    with pytest.raises(kind, match="item 4 is bad"):
        for item in work:
            seen.append(item)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_error_of_the_items_is_raised_after_those_before_it(depth):
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("disk gone")

    seen = []
    with pytest.raises(OSError, match="disk gone"):
        for item in run_ahead(items(), lambda item: item, depth, CPU):
            seen.append(item)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("how", ["close", "break", "error"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_consumer_that_stops_early_ends_the_worker(depth, how):
    prepared = []
    work = run_ahead(iter(int, 1), lambda item: prepared.append(item) or item, depth, CPU)
    next(work)
    assert threading.active_count() > 1
    if how == "close":
        work.close()
    elif how == "break":
        for _ in work:
            break
        del work
    else:
        with pytest.raises(RuntimeError):
            work.throw(RuntimeError("the draft step failed"))
    assert not [thread for thread in threading.enumerate() if "_produce" in thread.name]
    assert len(prepared) <= 2 + depth


@pytest.mark.parametrize("depth", [1, 2])
def test_preparation_runs_beside_the_consumer(depth):
    began = threading.Event()

    def prepare(item: int) -> int:
        if item == 1:
            began.set()
        return item

    work = run_ahead(range(2), prepare, depth, CPU)
    next(work)
    assert began.wait(timeout=10)
    assert list(work) == [1]
