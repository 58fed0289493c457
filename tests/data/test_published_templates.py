"""Masks of chat templates as they are published. Skipped where pip reaches no index."""

import pytest

from tests.data.published_templates import CASES, TABLE, NoIndex, outcome, table, templates


@pytest.fixture(scope="module")
def lines() -> list[str]:
    try:
        return list(table())
    except NoIndex as error:
        pytest.skip(str(error))


def test_no_mask_of_a_published_template_is_wrong(lines):
    assert len(templates()) > 130
    assert [line for line in lines if "| wrong" in line] == []


def test_the_published_table_is_what_the_masks_are(lines):
    assert TABLE.read_text(encoding="utf-8") == "\n".join(lines) + "\n"


def test_a_mask_that_is_wrong_is_found(lines):
    """The judge itself: a template that says more in a reply than its prompt allows for."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.content if m.role == 'assistant' else '' }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert outcome(source, "plain").detail == "the words are masked 2 times"
    assert set(CASES) == {"plain", "several turns", "tools", "thinking on", "thinking off"}
