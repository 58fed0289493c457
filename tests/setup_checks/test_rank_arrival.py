"""Ranks that do not come are named, instead of waited for without end."""

import threading
import time
from functools import partial

import pytest
from torch.distributed import HashStore

from engine.setup_checks import rank_arrival
from engine.setup_checks.rank_arrival import FACTS, collect_facts, judge_arrival, let_go_on, open_store, send_facts, shall_go_on
from tests.distributed import free_port
from tests.setup_facts import make_ranks
from tests.waiting import HANG_S


class TimeOfRankZero:
    """Stands for `time` in `rank_arrival`: only the sleeps of the main thread, which is rank 0, let its seconds pass."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def monotonic(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            self._now_s += seconds
        else:
            time.sleep(seconds)


def test_facts_of_the_ranks_that_come_arrive_and_the_missing_one_is_named(monkeypatch):
    monkeypatch.setattr(rank_arrival, "time", TimeOfRankZero())
    ranks = make_ranks(num_nodes=3, local_size=1)
    port = free_port()
    answers = []
    shown = []
    is_waited_for = threading.Event()
    has_sent = threading.Event()
    server = open_store("127.0.0.1", port, 3, True, HANG_S)

    def other() -> None:
        store = open_store("127.0.0.1", port, 3, False, HANG_S)
        assert is_waited_for.wait(HANG_S)
        send_facts(store, ranks[2])
        assert store.check([FACTS.format(2)]), "a question that is answered after the facts were stored"
        has_sent.set()
        answers.append(shall_go_on(store, HANG_S))

    def show(text: str) -> None:
        """Let rank 2 come after rank 0 has looked for it the first time."""
        shown.append(text)
        is_waited_for.set()
        assert has_sent.wait(HANG_S)

    thread = threading.Thread(target=other)
    thread.start()
    arrived, unreadable = collect_facts(server, ranks[0], 3, 0.6, show)
    finding = judge_arrival(arrived, 3, 0.6, "node0, port 1")
    let_go_on(server, False)
    thread.join()
    assert arrived == [ranks[0], ranks[2]] and not unreadable and answers == [False]
    assert finding.status == "problem" and finding.text.startswith("rank 1 of 3 did not come within 1 s; node0 (rank 0), node2")
    assert shown[0] == "1 of 3 ranks have come; waiting for ranks 1-2"
    assert shown[-1] == "2 of 3 ranks have come; waiting for rank 1"
    assert judge_arrival(ranks, 3, 1, "").text == "3 ranks on 3 nodes: node0 (rank 0), node1 (rank 1), node2 (rank 2)"


def test_a_rank_0_that_is_not_there_is_named():
    port = free_port()
    with pytest.raises(ValueError, match=f"rank 0 was not reached at 127.0.0.1, port {port}"):
        open_store("127.0.0.1", port, 2, False, 0.2)


def test_a_rank_alone_needs_no_store():
    own = make_ranks(num_nodes=1, local_size=1)[0]
    store = open_store("nowhere", 0, 1, True, 1)
    assert collect_facts(store, own, 1, 0, partial(print)) == ([own], [])


def test_a_rank_whose_facts_cannot_be_read_has_come():
    ranks = make_ranks(num_nodes=3, local_size=1)
    store = HashStore()
    send_facts(store, ranks[2])
    store.set(FACTS.format(1), '{"host": "node1", "node": 1, "facts": {"rank": 1}}')
    arrived, unreadable = collect_facts(store, ranks[0], 3, 5, partial(print))
    assert arrived == [ranks[0], ranks[2]] and [rank.host for rank in unreadable] == ["node1"]
    finding = judge_arrival([*arrived, *unreadable], 3, 5, "")
    assert finding.text == "3 ranks on 3 nodes: node0 (rank 0), node1 (rank 1), node2 (rank 2)"
