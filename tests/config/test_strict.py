"""What values an option takes, and what they become."""

from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le

from engine.config.strict import ConfigError, read_as

TAKEN = [
    (5, float, 5.0),
    ([1, 2], tuple[int, ...], (1, 2)),
    ([[1], []], tuple[tuple[int, ...], ...], ((1,), ())),
    ([0.5], float | tuple[float, ...], (0.5,)),
    (None, Annotated[int, Ge(1)] | None, None),
    (1, Annotated[int, Ge(1), Le(1)], 1),
    ({"a": [1]}, dict[str, Any], {"a": [1]}),
    (2, Literal[1, 2], 2),
]
REFUSED = [
    (True, int),
    (True, float),
    (1.0, int),
    ("1", int),
    (float("nan"), float),
    (float("inf"), float | None),
    (0, Annotated[int, Ge(1)] | None),
    (2.5, Annotated[float, Le(1)]),
    (1, bool),
    (True, Literal[0, 1]),
    (1.0, Literal[0, 1]),
    ([True], tuple[Literal[0, 1], ...]),
    ("ab", tuple[str, ...]),
    ({1: "a"}, dict[str, Any]),
]


@pytest.mark.parametrize(("value", "kind", "expected"), TAKEN, ids=repr)
def test_a_value_that_fits_becomes_one_of_its_type(value, kind, expected):
    read = read_as(value, kind)
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize(("value", "kind"), REFUSED, ids=repr)
def test_a_value_of_another_type_or_beyond_the_bounds_is_refused(value, kind):
    with pytest.raises(ConfigError, match="expected"):
        read_as(value, kind)
