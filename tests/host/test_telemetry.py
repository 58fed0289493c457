import io
import re

import pytest
from rich.console import Console

from engine.host.telemetry import SECONDS_BETWEEN_LINES, Telemetry


def telemetry_to(file: io.StringIO, *, terminal: bool = False, speaks: bool = True) -> Telemetry:
    telemetry = Telemetry(speaks)
    telemetry.console = Console(
        file=file, force_terminal=terminal, quiet=not speaks, highlight=False, soft_wrap=True, width=200
    )
    return telemetry


@pytest.mark.parametrize("terminal", [False, True])
def test_only_the_rank_that_speaks_is_heard(terminal):
    for speaks in (True, False):
        file = io.StringIO()
        telemetry = telemetry_to(file, terminal=terminal, speaks=speaks)
        with telemetry.stage("Training"), telemetry.progress(3, "steps") as progress:
            telemetry.note("a note")
            for step in range(3):
                progress.move_to(step + 1, "loss 1.0")
        heard = file.getvalue()
        assert (all(word in heard for word in ("Training", "a note", "loss 1.0", "3/3"))) if speaks else heard == ""


def test_what_looks_like_markup_is_printed_as_it_is():
    file = io.StringIO()
    telemetry = telemetry_to(file)
    with telemetry.stage("Reading [data]"):
        telemetry.note("/runs/[bold]/draft")
        telemetry.note("[/closed] too early")
    assert file.getvalue() == "Reading [data]\n/runs/[bold]/draft\n[/closed] too early\n"


def test_a_text_that_looks_like_markup_does_not_break_the_bar():
    file = io.StringIO()
    with telemetry_to(file, terminal=True).progress(1, "[/steps]") as progress:
        progress.move_to(1, "loss [/nan]")
    assert "[/nan]" in file.getvalue()


def test_stages_keep_their_seconds(monkeypatch):
    clock = iter([100.0, 100.25, 200.0, 203.456])
    monkeypatch.setattr("engine.host.telemetry.time.perf_counter", lambda: next(clock))
    telemetry = telemetry_to(io.StringIO())
    with telemetry.stage("First"):
        pass
    with telemetry.stage("Second"):
        pass
    assert list(telemetry.stage_s.items()) == [("First", 0.25), ("Second", 3.46)]


def test_without_a_terminal_progress_is_a_line_now_and_then_and_one_at_the_end(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr("engine.host.telemetry.time.perf_counter", lambda: seconds[0])
    file = io.StringIO()
    with telemetry_to(file).progress(1000, "steps") as progress:
        for step in range(1, 1001):
            seconds[0] += 0.1
            progress.move_to(step, f"loss {step}.")
    lines = file.getvalue().splitlines()
    assert 100 / SECONDS_BETWEEN_LINES - 2 <= len(lines) <= 100 / SECONDS_BETWEEN_LINES + 1
    assert "1,000/1,000" in lines[-1] and "loss 1000." in lines[-1] and "0 s left" in lines[-1]


def test_a_resumed_bar_starts_where_the_checkpoint_stands_and_reckons_with_its_own_steps(monkeypatch):
    clock = iter(range(100, 200, 10))
    monkeypatch.setattr("engine.host.telemetry.time.perf_counter", lambda: next(clock))
    file = io.StringIO()
    with telemetry_to(file).progress(10, "steps") as progress:
        progress.start_at(6)
        progress.move_to(7, "loss")
    # one step took the 10 s between the clock's first two readings, three are left
    assert re.search(r"7/10  loss  10 s, 30 s left", file.getvalue())


def test_a_run_resumed_at_its_end_has_nothing_left_to_do():
    file = io.StringIO()
    with telemetry_to(file).progress(5, "steps") as progress:
        progress.start_at(5)
    assert file.getvalue() == ""


def test_a_line_about_a_node_is_printed_by_its_first_rank(monkeypatch):
    monkeypatch.setattr("engine.host.telemetry.socket.gethostname", lambda: "node5")
    file = io.StringIO()
    telemetry_to(file).note_of_node("  no figures", local_rank=0)
    assert file.getvalue() == "  no figures\n"
    warned: list[str] = []
    for local_rank in (0, 1):
        silent = telemetry_to(io.StringIO(), speaks=False)
        monkeypatch.setattr(silent, "warn", warned.append)
        silent.note_of_node("  no figures", local_rank)
    assert warned == ["  node5: no figures"]
