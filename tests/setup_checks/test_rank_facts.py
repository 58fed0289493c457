"""Facts travel as text, and ranks are named by node."""

from engine.setup_checks.rank_facts import RankFacts, names_of, numbers
from tests.setup_facts import make_ranks, with_machine


def test_facts_are_the_same_after_their_journey():
    for facts in (make_ranks()[5], with_machine(make_ranks(), 0, gpu=None, locked_bytes=8)[0]):
        assert RankFacts.loads(facts.dumps()) == facts


def test_ranks_are_named_by_node_and_many_nodes_are_counted():
    ranks = make_ranks(num_nodes=3)
    assert names_of([ranks[0], ranks[1], ranks[3], ranks[8]]) == "node0 (ranks 0-1, 3), node2 (rank 8)"
    assert names_of(make_ranks(num_nodes=10, local_size=1)).endswith("node7 (rank 7) and 2 more nodes")
    assert numbers([4]) == "rank 4"
