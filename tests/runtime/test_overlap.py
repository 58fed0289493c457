import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from engine.config.sections import Config, OverlapSection, ParallelSection, TargetSection
from engine.config.strict import ConfigError
from engine.runtime.overlap import check_run_ahead, run_ahead

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

    work = run_ahead(range(9), prepare, depth, CPU)
    seen = []
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


class FakeCuda:
    """Stands for `torch.cuda`: notes who does what to which stream, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple] = []
        for name in ("Stream", "current_stream", "set_device", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def note(self, *call: object) -> None:
        is_worker = threading.current_thread() is not threading.main_thread()
        self.calls.append(("worker" if is_worker else "main", *call))

    def Stream(self, device: torch.device) -> "FakeStream":
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
    work = run_ahead(range(1), lambda item: cuda.note("prepares") or item, 1, torch.device("cuda", 3))
    assert list(work) == [0]
    by_main = [call[1:] for call in cuda.calls if call[0] == "main"]
    by_worker = [call[1:] for call in cuda.calls if call[0] == "worker"]
    assert cuda.calls[0] == ("main", "side", "waits for", "main's"), "weights may still be on their way"
    assert by_worker == [("set_device", 3), ("on", "side"), ("prepares",), ("off", "side"), ("side", "records")]
    assert by_main[1:] == [("main's", "waits for", "event")]


@pytest.mark.parametrize(
    ("config", "runs_ahead"),
    [
        (Config(), 0),
        (Config(target=TargetSection(store="/store")), 2),
        (Config(target=TargetSection(store="/store"), overlap=OverlapSection(run_ahead=0)), 0),
        (Config(overlap=OverlapSection(run_ahead=1)), 1),
    ],
)
def test_a_store_is_read_ahead_unless_the_user_says_otherwise(config, runs_ahead):
    assert config.run_ahead == runs_ahead


def test_a_target_that_ranks_share_over_nccl_does_not_run_ahead():
    gpu = torch.device("cuda", 0)
    ahead = OverlapSection(run_ahead=1)
    shared = Config(parallel=ParallelSection(tp_size=2, ep_size=4), overlap=ahead)
    with pytest.raises(ConfigError, match="overlap.run_ahead = 1.*while 4 ranks share the target") as refused:
        check_run_ahead(shared.run_ahead, shared.target_ranks, gpu)
    assert refused.value.key == "overlap.run_ahead"
    stored = Config(target=TargetSection(store="/store"), parallel=ParallelSection(tp_size=2), overlap=ahead)
    for config, device in [(shared, CPU), (Config(overlap=ahead), gpu), (stored, gpu)]:
        check_run_ahead(config.run_ahead, config.target_ranks, device)
    check_run_ahead(0, shared.target_ranks, gpu)
