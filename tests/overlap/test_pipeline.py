import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.overlap.look_ahead import Limits
from engine.overlap.pipeline import Pipeline, Producer, SerialPipeline, ThreadedPipeline, TurnsPipeline
from engine.overlap.step_clock import DRAFT_PARTS, PARTS, TARGET_FORWARD, StepClock
from tests.overlap.virtual_time import VirtualTime
from tests.waiting import HANG_S, wait_until

CPU = torch.device("cpu")
# Execution, look-ahead and pauses per item. What must hold in every placement is tested for each of these.
KINDS = [
    ("serial", 0, 0),
    ("threaded", 0, 0),
    ("threaded", 1, 0),
    ("threaded", 3, 0),
    ("turns", 0, 0),
    ("turns", 1, 3),
    ("turns", 3, 1),
]
AHEAD = [kind for kind in KINDS if kind[0] != "serial"]


def pipeline(kind: tuple[str, int, int], items: Iterable[Any], prepare: Callable[[Any], Any], **options: Any) -> Pipeline:
    name, depth, num_pauses = kind
    clock = StepClock(CPU)
    producer = Producer(items, prepare, options.pop("num_bytes", lambda item: 0))
    limits = Limits(depth, options.pop("limit", None))
    if name == "serial":
        return SerialPipeline(producer, clock)
    if name == "threaded":
        return ThreadedPipeline(producer, clock, limits, CPU)
    return TurnsPipeline(producer, clock, limits, CPU, num_pauses=num_pauses)


def train_step(work: Pipeline) -> None:
    for part in DRAFT_PARTS:
        with work.part(part):
            pass


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    wait_until(lambda: set(threading.enumerate()) <= before)


@pytest.mark.parametrize("count", [0, 1, 2, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_every_item_is_prepared_once_and_comes_in_order(kind, count):
    prepared = []
    with pipeline(kind, range(count), lambda item: prepared.append(item) or item * item) as work:
        assert list(work) == [item * item for item in range(count)]
        assert list(work) == [], "the end stays the end"
    assert prepared == list(range(count))


@pytest.mark.parametrize("kind", AHEAD)
def test_preparation_is_never_more_than_the_look_ahead_in_front_and_gets_that_far(kind):
    prepared = []
    depth = kind[1]
    with pipeline(kind, range(12), lambda item: prepared.append(item) or item) as work:
        for asked in range(1, 13):
            next(work)
            for _ in range(5):  # steps of the draft, each of which is time for one batch and more
                train_step(work)
            wait_until(lambda: len(prepared) >= min(12, asked + depth))  # noqa: B023 (called before `asked` moves on)
            time.sleep(0.003)  # time enough for one too many
            assert len(prepared) == min(12, asked + depth)
        assert list(work) == []


@pytest.mark.parametrize("kind", AHEAD)
def test_bytes_ahead_stay_below_their_limit_and_a_batch_above_it_still_comes(kind):
    sizes = [3, 4, 5, 20, 1, 1, 1, 9]
    prepared = []
    with pipeline(kind, range(8), lambda item: prepared.append(item) or item, num_bytes=sizes.__getitem__, limit=10) as work:
        for asked in range(8):
            assert next(work) == asked
            train_step(work)
            time.sleep(0.003)
            assert sum(sizes[item] for item in list(prepared) if item > asked) <= 10


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_happens_before_the_first_item_is_asked_for(kind):
    prepared = []
    with pipeline(kind, range(3), prepared.append):
        time.sleep(0.003)
    assert prepared == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_prepare_is_raised_where_its_result_would_have_been(kind, error):
    def prepare(item: int) -> int:
        if item == 4:
            raise error("item 4 is bad")
        return item

    seen = []
    with pytest.raises(error, match="item 4 is bad"), pipeline(kind, range(9), prepare) as work:
        for item in work:
            train_step(work)
            seen.append(item)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_items_is_raised_after_those_before_it(kind):
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("disk gone")

    seen = []
    with pytest.raises(OSError, match="disk gone"), pipeline(kind, items(), lambda item: item) as work:
        for item in work:
            train_step(work)
            seen.append(item)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("kind", AHEAD)
def test_a_consumer_that_stops_early_ends_the_worker(kind):
    prepared = []
    work = pipeline(kind, iter(int, 1), lambda item: prepared.append(item) or item)
    with pytest.raises(RuntimeError, match="the draft step failed"), work:
        next(work)
        assert [thread for thread in threading.enumerate() if thread.name == "overlap-producer"]
        raise RuntimeError("the draft step failed")
    assert not [thread for thread in threading.enumerate() if thread.name == "overlap-producer"]
    assert len(prepared) <= 2 + kind[1]


def test_a_threaded_producer_works_while_the_consumer_does_something_else():
    began = threading.Event()

    def prepare(item: int) -> int:
        if item == 1:
            began.set()
        return item

    with pipeline(("threaded", 1, 0), range(2), prepare) as work:
        next(work)
        assert began.wait(HANG_S)
        assert list(work) == [1]


@pytest.mark.parametrize("pauses", [0, 1, 2, 5, 8])
def test_in_turns_the_order_follows_from_the_program_alone(pauses):
    """What would be collectives: every part of both sides, in the order in which they are issued."""

    def issued(delay_s: float) -> list[str]:
        order: list[str] = []

        def prepare(item: int) -> int:
            for group in range(pauses + 1):
                time.sleep(delay_s * ((item + group) % 3))
                order.append(f"target {item}.{group}")
                if group < pauses:
                    work.pause()
            return item

        with pipeline(("turns", 1, pauses), range(5), prepare) as work:
            for item in work:
                for part in DRAFT_PARTS:
                    with work.part(part):
                        time.sleep(delay_s * (item % 2))
                        order.append(f"{part} {item}")
        return order

    first = issued(0.0)
    assert first == issued(0.001)
    # The next batch is spread over the step: some of it is issued before every part, as far as there are enough groups.
    own = [name for name in first if name.startswith("target 3")]
    between = [first.index(f"{part} 2") for part in DRAFT_PARTS]
    before = [sum(first.index(name) < place for name in own) for place in between]
    assert before == [(pauses + 1) * turn // len(DRAFT_PARTS) for turn in (1, 2, 3)]


def test_a_pause_outside_of_the_producer_does_nothing():
    for kind in KINDS:
        with pipeline(kind, range(2), lambda item: item) as work:
            work.pause()
            assert list(work) == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_charged_for_its_own_time_only(kind, monkeypatch):
    time = VirtualTime(monkeypatch)

    def prepare(item: int) -> int:
        for group in range(kind[2] + 1):
            time.sleep(0.01 / (kind[2] + 1))
            if group < kind[2]:
                work.pause()
        return item

    with pipeline(kind, range(4), prepare) as work:
        for _ in work:
            for part in DRAFT_PARTS:
                with work.part(part):
                    time.sleep(0.03)
    seconds = work._clock.take_seconds()
    assert set(seconds) == set(PARTS)
    assert [seconds[part] for part in DRAFT_PARTS] == pytest.approx([0.12] * len(DRAFT_PARTS))
    assert seconds[TARGET_FORWARD] == pytest.approx(0.04), "it is not charged for waiting for its turn"


def test_limits_can_change_while_it_runs():
    prepared = []
    for name in ("threaded", "turns"):
        prepared.clear()
        with pipeline((name, 0, 0), range(9), lambda item: prepared.append(item) or item) as work:
            next(work)
            train_step(work)
            time.sleep(0.003)
            assert prepared == [0]
            work.set_limits(Limits(2))
            train_step(work)
            train_step(work)
            wait_until(lambda: prepared == [0, 1, 2])


class FakeCuda:
    """Stands for `torch.cuda`: notes who does what to which stream, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple] = []
        for name in ("Stream", "current_stream", "set_device", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def note(self, *call: object) -> None:
        is_worker = threading.current_thread() is not threading.main_thread()
        self.calls.append(("worker" if is_worker else "main", *call))

    def Stream(self, device: torch.device, priority: int) -> "FakeStream":
        return FakeStream(self, "side")

    def current_stream(self, device: torch.device) -> "FakeStream":
        return FakeStream(self, "main's")

    def set_device(self, device: torch.device) -> None:
        self.note("set_device", device.index)

    @contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        self.note("on", stream.name)
        yield
        self.note("off", stream.name)


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda = cuda
        self.name = name

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.note(self.name, "waits for", other.name)

    def record_event(self) -> str:
        self.cuda.note(self.name, "records")
        return "event"

    def wait_event(self, event: str) -> None:
        self.cuda.note(self.name, "waits for", event)


def test_on_a_gpu_the_worker_works_on_its_own_device_and_after_what_the_main_stream_had_begun(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    gpu = torch.device("cuda", 3)
    clock = StepClock(CPU)
    with ThreadedPipeline(Producer(range(1), lambda item: cuda.note("prepares") or item), clock, Limits(1), gpu) as work:
        assert list(work) == [0]
        work.release()
    by_main = [call[1:] for call in cuda.calls if call[0] == "main"]
    by_worker = [call[1:] for call in cuda.calls if call[0] == "worker"]
    assert cuda.calls[0] == ("main", "side", "waits for", "main's"), "weights may still be on their way"
    assert by_worker == [("set_device", 3), ("on", "side"), ("prepares",), ("side", "records"), ("off", "side")]
    assert by_main[1:] == [("main's", "waits for", "event"), ("main's", "records")]


@pytest.mark.parametrize("kind", AHEAD)
def test_an_error_outside_of_prepare_ends_the_consumer_too(kind, monkeypatch):
    monkeypatch.setattr("engine.overlap.streams.SideStream.enter_thread", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError), pipeline(kind, range(3), lambda item: item) as work:
        next(work)


@pytest.mark.parametrize("kind", AHEAD)
def test_after_it_is_closed_nothing_comes(kind):
    work = pipeline(kind, range(9), lambda item: item)
    assert next(work) == 0
    work.close()
    assert len(list(work)) <= kind[1], "what was prepared before"


@pytest.mark.parametrize("kind", AHEAD)
def test_what_was_taken_is_not_kept(kind):
    with pipeline(kind, range(200), lambda item: item) as work:
        list(work)
        assert work._side._received == []
