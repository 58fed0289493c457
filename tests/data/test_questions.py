"""Rows of benchmarks, as they are published, become prompts."""

import pytest

from engine.data.messages import read_messages
from engine.data.questions import category_of, with_conversation

ROWS = {
    "mt_bench file": ({"question_id": 81, "category": "writing", "turns": ["Ask.", "Again."]}, "Ask.", "writing"),
    "mt_bench": ({"category": "math", "prompt": ["Ask.", "Again."], "reference": [], "prompt_id": 1}, "Ask.", "math"),
    "gsm8k": ({"question": "How many?", "answer": "#### 3"}, "How many?", None),
    "humaneval": ({"task_id": "H/0", "prompt": "def f():\n", "canonical_solution": "  pass", "test": ""}, "def f():\n", None),
    "math500": ({"problem": "Solve.", "solution": "3", "answer": "3", "subject": "Algebra", "level": 2}, "Solve.", "Algebra"),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_question_is_the_users_turn_and_the_category_is_kept(name):
    row, question, category = ROWS[name]
    messages, _ = read_messages(with_conversation(row))
    assert [(message["role"], message["content"]) for message in messages] == [("user", question), ("assistant", "...")]
    assert category_of(row) == category


@pytest.mark.parametrize(
    "sample", [{"conversations": [], "prompt": "x"}, {"text": "x", "question": "y"}, {"prompt": " "}, [1], None]
)
def test_conversations_and_rows_without_a_question_stay_as_they_are(sample):
    assert with_conversation(sample) is sample
    assert category_of(sample) is None
