"""The embedded target is a real language model of what it was trained on."""

import sys
from pathlib import Path

import pytest

EMBEDDED = Path(__file__).resolve().parents[2] / "launcher" / "embedded"
sys.path.insert(0, str(EMBEDDED))

from honesty import KneserNeyTrigram, judge, repeated_share  # noqa: E402 (a script's folder joins sys.path first)


def test_the_embedded_target_is_honest():
    judgement = judge(EMBEDDED / "target", num_documents=30, num_replies=12)
    assert judgement.held_out_loss < judgement.trigram_loss - 0.5
    assert judgement.repeated_8_grams <= 0.10
    assert judgement.reply_tokens > 8


def test_the_embedded_target_is_small():
    assert sum(path.stat().st_size for path in (EMBEDDED / "target").iterdir()) < 8e6


def test_a_trigrams_probabilities_sum_to_one():
    trigram = KneserNeyTrigram([[0, 1, 2, 3, 1, 2, 0], [2, 2, 1, 0, 1, 2, 4]], vocab_size=6)
    for context in [(1, 2), (0, 1), (5, 2), (5, 5)]:
        assert sum(trigram.probability(*context, third) for third in range(6)) == pytest.approx(1)


def test_repeats_are_counted_within_and_between_replies():
    assert repeated_share([list(range(20)), list(range(100, 120))]) == 0
    assert repeated_share([list(range(20)), list(range(20))]) == 0.5
    assert repeated_share([[1, 2] * 10]) == 11 / 13
