"""Sizes and numbers of things are given in words that fit them."""

import pytest

from engine.host.units import GIB, KIB, MIB, TIB, counted, size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (4 * KIB - 4, "4 KiB"),
        (512 * KIB, "512 KiB"),
        (MIB - 64, "1 MiB"),
        (16 * MIB - 8, "16 MiB"),
        (1000 * MIB, "1,000 MiB"),
        (1.5 * GIB, "1.5 GiB"),
        (79.96 * GIB, "80 GiB"),
        (2 * TIB, "2 TiB"),
    ],
)
def test_a_size_is_given_in_the_largest_unit_that_fits(num_bytes, text):
    assert size_text(num_bytes) == text


def test_a_number_decides_the_form_of_its_noun():
    assert [counted(number, "rank") for number in (0, 1, 2, 1024)] == ["0 ranks", "1 rank", "2 ranks", "1,024 ranks"]
