"""Facts travel as text, also those of another copy of DraftSpeed, and ranks are named by node."""

import json

import pytest

from engine.setup_checks.rank_facts import UnreadableRank, load_facts, names_of, numbers
from tests.setup_facts import make_ranks, with_machine


def test_facts_are_the_same_after_their_journey():
    for facts in (make_ranks()[5], with_machine(make_ranks(), 0, gpu=None, locked_bytes=8)[0]):
        assert load_facts(facts.dumps(), facts.rank) == facts


@pytest.mark.parametrize("changed", [{"new_fact": 1}, {"python": None}])
def test_a_copy_with_other_facts_says_which_one_it_is(changed):
    values = json.loads(make_ranks()[5].dumps())
    software = values["facts"]["software"] | changed
    values["facts"]["software"] = {name: value for name, value in software.items() if value is not None}
    assert load_facts(json.dumps(values), 5) == UnreadableRank(5, "node1", 1, "0.1.0", "0123456789ab")
    assert load_facts("{}", 5).host == "unknown node"


def test_ranks_are_named_by_node_and_many_nodes_are_counted():
    ranks = make_ranks(num_nodes=3)
    assert names_of([ranks[0], ranks[1], ranks[3], ranks[8]]) == "node0 (ranks 0-1, 3), node2 (rank 8)"
    assert names_of(make_ranks(num_nodes=10, local_size=1)).endswith("node7 (rank 7) and 2 more nodes")
    assert numbers([4]) == "rank 4"
