"""Every pair of values of two axes occurs in a case."""

import itertools

from tests.pairwise import pairwise

AXES = {"a": [1, 2, 3], "b": ["x", "y"], "c": [None, True, 2.5, "z"]}


def test_every_pair_occurs_in_fewer_cases_than_the_product_has():
    names, cases = pairwise(**AXES).args
    assert names == list(AXES)
    assert len(cases) < 3 * 2 * 4
    for (first, own), (second, other) in itertools.combinations(enumerate(AXES.values()), 2):
        for pair in itertools.product(own, other):
            assert any((case[first], case[second]) == pair for case in cases), pair
