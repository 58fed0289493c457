"""Findings are printed at once, and checks that take too long end with a summary."""

import threading
import time

import pytest

from engine.setup_checks import setup_report
from engine.setup_checks.finding import ok, problem, warning
from engine.setup_checks.setup_report import SetupReport
from tests.waiting import HANG_S


def test_findings_appear_at_once_and_the_summary_once(capsys):
    report = SetupReport(speaks=True, as_json=False)
    report.begin("Disk")
    report.add(ok("disk space", "90 GiB free"), warning("disk speed", "writes 20 MB/s", "Use another disk"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Disk" and printed[1].split() == ["ok", "disk", "space", "90", "GiB", "free"]
    assert printed[3].split() == ["to", "fix", "Use", "another", "disk"]
    report.finish()
    report.finish()
    report.interrupt()
    assert capsys.readouterr().out.startswith("ready, with 1 warning (") and report.exit_code == 0


def test_other_ranks_do_not_print(capsys):
    report = SetupReport(speaks=False, as_json=False)
    report.add(ok("disk space", "90 GiB free"))
    report.finish()
    assert capsys.readouterr().out == ""


def begin_limits_after(event: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the seconds of a limit pass only once an event is set, which may take long on a busy machine."""

    class LateTimer(threading.Timer):
        def run(self) -> None:
            assert event.wait(HANG_S)
            super().run()

    monkeypatch.setattr(setup_report.threading, "Timer", LateTimer)


def test_a_check_that_takes_too_long_is_a_problem_and_ends_the_job(capsys, monkeypatch):
    is_busy = threading.Event()
    begin_limits_after(is_busy, monkeypatch)
    report = SetupReport(speaks=True, as_json=False)
    report.begin("Links")
    has_ended = threading.Event()
    with report.limit(0.05, "Look at the network", lambda text: has_ended.set()):
        report.busy("all-reduce across nodes, 16 MiB")
        is_busy.set()
        assert has_ended.wait(HANG_S)
    with report.limit(HANG_S, "Look at the network", lambda text: has_ended.clear()):
        pass
    report.interrupt()
    assert has_ended.is_set() and report.exit_code == 1
    printed = capsys.readouterr().out.splitlines()
    assert "did not end within 0 s: all-reduce across nodes" in printed[1]
    assert printed[-1].startswith("not ready: 1 problem")


def test_an_interrupted_check_is_a_problem_next_to_others(capsys):
    report = SetupReport(speaks=True, as_json=False)
    report.add(problem("disk", "cannot be written", "Use another disk"))
    report.begin("Training")
    report.interrupt()
    assert [finding.name for finding in report.findings] == ["disk", "Training"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("not ready: 2 problems")


def test_output_that_nobody_reads_does_not_delay_the_end(monkeypatch):
    monkeypatch.setattr(setup_report, "SECONDS_FOR_OUTPUT", 0.05)
    report = SetupReport(speaks=True, as_json=False)
    is_writing = threading.Event()
    is_read = threading.Event()
    has_ended = threading.Event()

    def write(text: str) -> None:
        is_writing.set()
        is_read.wait(2 * HANG_S)

    monkeypatch.setattr(report, "_write", write)
    writer = threading.Thread(target=report.note, args=("a line",))
    writer.start()
    assert is_writing.wait(HANG_S)
    began_s = time.monotonic()
    with report.limit(0.05, "Look at the network", lambda text: has_ended.set()):
        assert has_ended.wait(HANG_S)
    report.interrupt()
    assert time.monotonic() - began_s < HANG_S and not report.findings
    assert writer.is_alive(), "its output is not read yet"
    is_read.set()
    writer.join()
