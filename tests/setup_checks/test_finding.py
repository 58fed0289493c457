"""The verdict and the exit code follow from the worst finding."""

import pytest

from engine.setup_checks.finding import LONGEST_LINE, exit_code, first_line, ok, problem, verdict, warning

GOOD = ok("a", "fine")
SLOW = warning("b", "slow", "Do this")
BAD = problem("c", "broken", "Do that")


@pytest.mark.parametrize(
    ("findings", "line", "code"),
    [
        ([GOOD], "ready", 0),
        ([GOOD, SLOW], "ready, with 1 warning", 0),
        ([SLOW, SLOW], "ready, with 2 warnings", 0),
        ([SLOW, BAD], "not ready: 1 problem", 1),
        ([BAD, BAD], "not ready: 2 problems", 1),
    ],
)
def test_the_verdict_names_the_worst_findings(findings, line, code):
    assert verdict(findings) == line
    assert exit_code(findings) == code


def test_messages_of_libraries_are_shortened_to_a_line():
    assert first_line("\nCUDA error: out of luck\nCompile with ...\n") == "CUDA error: out of luck"
    assert first_line("") == "" and first_line("a" * 1000) == "a" * LONGEST_LINE + "..."
