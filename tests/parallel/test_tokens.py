import pytest

from engine.parallel.tokens import Tokens, bounds, current_tokens, tokens_of_forward


def test_own_tokens_and_documents_lie_behind_those_of_lower_ranks():
    tokens = Tokens(((5, 9), (12,), (3, 7, 2)), rank=2)
    assert tokens.counts_R == (14, 12, 12) and (tokens.num_own, tokens.num_all) == (12, 38)
    assert tokens.own == slice(26, 38) and tokens.own_documents == range(3, 6)
    assert tokens.documents == (5, 9, 12, 3, 7, 2)


def test_parts_follow_one_another():
    assert bounds((5, 9, 1)) == [(0, 5), (5, 14), (14, 15)] and bounds(()) == []


def test_a_forward_inside_another_has_its_own_tokens():
    outer = Tokens(((1,),), 0)
    inner = Tokens(((2,),), 0)
    with tokens_of_forward(outer):
        with tokens_of_forward(inner):
            assert current_tokens() is inner
        assert current_tokens() is outer


def test_parts_of_a_forward_hold_every_document_once():
    tokens = Tokens(((9, 5, 2), (12, 1, 1, 8), (10, 7)), rank=1)
    assert [len(tokens.parts(count)) for count in (1, 2, 3, 9)] == [1, 2, 2, 2], "a rank has no more than two"
    first, second = tokens.parts(2)
    assert first.tokens.documents_R == ((9,), (12,), (10,)) and second.tokens.documents_R == ((5, 2), (1, 1, 8), (7,))
    assert (first.own, second.own) == (slice(0, 12), slice(12, 22))
    assert first.rows == (slice(0, 9), slice(16, 28), slice(38, 48)) and second.documents == (1, 2, 4, 5, 6, 8)
    assert sorted(first.documents + second.documents) == list(range(9))


def test_parts_that_would_exchange_much_more_are_not_made():
    assert len(Tokens(((4000, 96), (96, 4000)), 0).parts(2)) == 1
    for documents_R in (((3000, 500, 596), (2048, 2048)), ((600,) * 7, (900,) * 4, (1000, 1000, 1900))):
        tokens = Tokens(documents_R, 0)
        parts = tokens.parts(2)
        assert sum(max(part.tokens.counts_R) for part in parts) <= 1.1 * max(tokens.counts_R)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (100, 1, 1), (1, 1, 100), (7, 7, 7, 7, 7)])
def test_no_part_is_empty(lengths):
    for count in (1, 2, 3):
        parts = Tokens((lengths,), 0).parts(count)
        assert len(parts) == count and all(part.tokens.num_all for part in parts)
        assert sum((part.tokens.documents for part in parts), ()) == lengths
