from engine.parallel.tokens import Tokens, bounds, current_tokens, tokens_of_forward


def test_own_tokens_and_documents_lie_behind_those_of_lower_ranks():
    tokens = Tokens(((5, 9), (12,), (3, 7, 2)), rank=2)
    assert tokens.counts_R == (14, 12, 12) and (tokens.num_own, tokens.num_all) == (12, 38)
    assert tokens.own == slice(26, 38) and tokens.documents[tokens.own_documents] == (3, 7, 2)
    assert tokens.documents == (5, 9, 12, 3, 7, 2)


def test_parts_follow_one_another():
    assert bounds((5, 9, 1)) == [(0, 5), (5, 14), (14, 15)] and bounds(()) == []


def test_a_forward_inside_another_has_its_own_tokens():
    outer, inner = Tokens(((1,),), 0), Tokens(((2,),), 0)
    with tokens_of_forward(outer):
        with tokens_of_forward(inner):
            assert current_tokens() is inner
        assert current_tokens() is outer
