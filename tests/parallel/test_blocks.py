import pytest
import torch
from torch import nn

from engine.parallel.blocks import by_document, keep_own, share, token_dim
from engine.parallel.mesh import Group
from engine.parallel.tokens import ByDocument, Tokens, tokens_of_forward

TOKENS = Tokens(((2, 3), (4,)), rank=0)


class Lengths(ByDocument):
    def __init__(self, lengths):
        self.lengths = lengths

    def of(self, documents):
        return Lengths(tuple(self.lengths[index] for index in documents))


class Cumulative(nn.Module):
    """Carries a sum along the tokens, as a recurrence would; remembers what it was called with."""

    def forward(self, hidden_states, position_ids=None, mask=None):
        self.seen = position_ids, None if mask is None else mask.lengths
        return hidden_states.cumsum(-2), None


@pytest.mark.parametrize(
    ("shape", "whole", "rows", "dim"),
    [
        ((1, 5, 8), False, False, -2),
        ((5, 8), False, True, -2),
        ((1, 5), True, False, -1),
        ((3, 1, 5), True, False, -1),
        ((1, 5, 2), True, False, -2),
        ((5, 2), True, True, -2),
        ((5,), True, False, -1),
        ((1, 9, 8), False, False, None),
        ((), False, False, None),
    ],
)
def test_the_dimension_of_tokens_is_found(shape, whole, rows, dim):
    tensor = torch.zeros(shape, dtype=torch.int64 if whole else torch.float32)
    assert token_dim(tensor, 5, rows) == dim


def test_one_token_is_not_taken_for_a_batch_of_one():
    assert token_dim(torch.zeros(1, 9, dtype=torch.int64), 1) is None
    assert token_dim(torch.zeros(1, 2, dtype=torch.int64), 1, rows=True) == -2


def test_what_is_replicated_gets_own_tokens_alone():
    module = Cumulative()
    keep_own(module)
    with tokens_of_forward(TOKENS):
        module(torch.ones(1, 5, 2), position_ids=torch.arange(9)[None], mask=Lengths((2, 3, 4)))
    positions, lengths = module.seen
    assert positions.tolist() == [[0, 1, 2, 3, 4]] and lengths == (2, 3)


def test_nothing_is_carried_from_one_document_to_the_next():
    module = Cumulative()
    by_document(module, shared=False)
    keep_own(module)
    with tokens_of_forward(TOKENS):
        output, weights = module(torch.ones(1, 5, 1), position_ids=torch.arange(9)[None], mask=Lengths((2, 3, 4)))
    assert output.flatten().tolist() == [1, 2, 1, 2, 3] and weights is None
    assert module.seen[0].tolist() == [[2, 3, 4]] and module.seen[1] == (3,)


def test_in_a_group_of_one_a_shared_block_is_the_block():
    module = Cumulative()
    share(module, Group())
    with tokens_of_forward(Tokens(((2, 3),), 0)):
        output, _ = module(torch.ones(1, 5, 1))
    assert output.flatten().tolist() == [1, 2, 3, 4, 5]
