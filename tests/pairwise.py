"""Cases that cover every pair of values of several axes, instead of their full product."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def pairwise(*, indirect: Sequence[str] = (), **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test so that each pair of values of any two axes occurs in at least one case.

    axes: the values of each parameter, by its name. indirect: parameters whose values go to the fixture of that name.
    Cases are chosen greedily and are the same in every run.
    """
    values = {name: list(axis) for name, axis in axes.items()}
    names = list(values)
    assert len(names) >= 2 and all(values.values()), "expected at least two axes, none of them empty"
    places = itertools.product(*(range(len(axis)) for axis in values.values()))
    candidates = {case: _pairs(case) for case in places}
    missing = set().union(*candidates.values())
    chosen = []
    while missing:
        case = max(candidates, key=lambda candidate: len(candidates[candidate] & missing))
        missing -= candidates.pop(case)
        chosen.append(tuple(values[name][place] for name, place in zip(names, case, strict=True)))
    return pytest.mark.parametrize(names, chosen, indirect=list(indirect))


def _pairs(case: tuple[int, ...]) -> frozenset[tuple[int, int, int, int]]:
    """Return every pair of axes with the places of their values in a case."""
    axes = itertools.combinations(range(len(case)), 2)
    return frozenset((first, case[first], second, case[second]) for first, second in axes)
