"""Replies on the page: every token shows its depth, and nothing in a text is obeyed."""

import re
from pathlib import Path

import pytest

from engine.evaluation.page_samples import SHADES, samples_section
from engine.evaluation.run_record import RunRecord


def section(tokens: list[str], depths: list[int], num_tokens: int | None = None) -> str:
    sample = {"step": 60, "source": "<f>:3", "prompt": "p<b>", "tokens": tokens, "depths": depths, "num_forwards": 2}
    sample["num_tokens"] = len(tokens) if num_tokens is None else num_tokens
    run = RunRecord(Path("run"), [], [], [sample], [], None, None, "")
    return samples_section(run, [run])


def test_each_token_has_the_look_and_the_title_of_its_depth():
    page = section(["a", " b", "", "é", "\n"], [0, 1, 2, 12, 0])
    reply = page.split('class="reply">')[1]
    found = re.findall(r'<span class="([^"]*)" title="([^"]*)">([^<]*)</span>', reply)
    assert found == [
        ("token", "the target's own token", "a"),
        ("token depth1", "1st drafted token", " b"),
        ("token depth2 piece", "2nd drafted token, a part of the next character", ""),
        (f"token depth{SHADES}", "12th drafted token", "é"),
        ("token", "the target's own token", "↵\n"),
    ]
    assert "step 60" in page and "7th or later" in page and "2.00 per target forward" in page


def test_texts_are_shown_and_not_obeyed():
    page = section(["<script>", "\x1b[31m"], [0, 1])
    assert "<script>" not in page and "&lt;script&gt;" in page and "\\x1b[31m" in page
    assert "p&lt;b&gt;" in page and "&lt;f&gt;:3" in page


def test_a_cut_reply_says_so_and_a_broken_one_is_an_error():
    assert "the first 2 tokens are shown" in section(["a", "b"], [0, 0], num_tokens=9)
    with pytest.raises(ValueError, match="shorter"):
        section(["a", "b"], [0])
