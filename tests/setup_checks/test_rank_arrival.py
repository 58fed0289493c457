"""Ranks that do not come are named, instead of waited for without end."""

import threading
from functools import partial

import pytest
from torch.distributed import HashStore

from engine.setup_checks.rank_arrival import FACTS, collect_facts, judge_arrival, let_go_on, open_store, send_facts, shall_go_on
from tests.distributed import free_port
from tests.setup_facts import make_ranks


def test_facts_of_the_ranks_that_come_arrive_and_the_missing_one_is_named():
    ranks = make_ranks(num_nodes=3, local_size=1)
    port = free_port()
    answers = []
    server = open_store("127.0.0.1", port, 3, True, 5)

    def other() -> None:
        store = open_store("127.0.0.1", port, 3, False, 5)
        send_facts(store, ranks[2])
        answers.append(shall_go_on(store, 5))

    thread = threading.Thread(target=other)
    thread.start()
    shown = []
    arrived, unreadable = collect_facts(server, ranks[0], 3, 0.6, shown.append)
    finding = judge_arrival(arrived, 3, 0.6, "node0, port 1")
    let_go_on(server, False)
    thread.join()
    assert arrived == [ranks[0], ranks[2]] and not unreadable and answers == [False]
    assert finding.status == "problem" and finding.text.startswith("rank 1 of 3 did not come within 1 s; node0 (rank 0), node2")
    assert "2 of 3 ranks have come; waiting for rank 1" in shown
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
