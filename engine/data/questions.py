"""Rows of benchmarks, such as MT-Bench, GSM8K, HumanEval and MATH-500, as conversations.

Such a row holds a question and perhaps its answer, under column names of its own.
"""

from typing import Any

# A list holds the turns of a dialogue, of which the first is asked.
QUESTION_COLUMNS = ("turns", "prompt", "question", "problem")
CATEGORY_COLUMNS = ("category", "subject")
CONVERSATION_COLUMNS = ("conversations", "text")
UNREAD_REPLY = "..."


def with_conversation(sample: Any) -> Any:
    """Return a benchmark's row with its question as the key `conversations`; other samples unchanged.

    The conversation ends with a reply that is never read, because a conversation must have one.
    """
    if not isinstance(sample, dict) or any(name in sample for name in CONVERSATION_COLUMNS):
        return sample
    for name in QUESTION_COLUMNS:
        value = sample.get(name)
        question = value[0] if isinstance(value, list) and value else value
        if isinstance(question, str) and question.strip():
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": UNREAD_REPLY}]
            return {"conversations": turns}
    return sample


def category_of(sample: Any) -> str | None:
    """Return the category that a benchmark's row names, or None."""
    if not isinstance(sample, dict):
        return None
    return next((str(sample[name]) for name in CATEGORY_COLUMNS if isinstance(sample.get(name), str)), None)
