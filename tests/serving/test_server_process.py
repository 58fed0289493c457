"""A server that was started is always ended, and a failed start shows what the server printed."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from engine.serving import server_process
from engine.serving.endpoint import VllmEndpoint
from engine.serving.http_stream import ServerFault, ServingError
from engine.serving.server_process import HOST, ServerProcess, check_port, free_port
from tests.serving.fake_server import left_running, program, running


def process_of(folder: Path, behaviour: str = "", timeout_s: float = 60.0) -> ServerProcess:
    port = free_port()
    command = [str(program(folder, behaviour)), "--port", str(port)]
    return ServerProcess(command, VllmEndpoint(f"http://{HOST}:{port}", 2.0), timeout_s)


class TimeOfProgram:
    """Stands for `time` in `server_process`: its seconds pass in sleeps, and only once the program runs.

    However long the program takes to start, a short time limit does not end before.
    """

    def __init__(self, folder: Path) -> None:
        self._pids = folder / "pids"
        self._now_s = 0.0

    def monotonic(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        if self._pids.exists():
            self._now_s += seconds


def test_a_server_is_ended_with_its_children_even_if_they_ignore_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr(server_process, "GRACE_S", 0.3)
    with pytest.raises(KeyboardInterrupt), process_of(tmp_path, "stubborn"):
        assert len(running(tmp_path)) == 2
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    assert left_running(tmp_path) == []


def test_a_server_that_ends_while_starting_shows_its_last_lines(tmp_path):
    with pytest.raises(ServingError) as caught:
        process_of(tmp_path, "dies").__enter__()
    message = str(caught.value)
    assert "ended while starting (exit code 1)" in message and "fix" in message
    assert message.endswith("loading the weights\nValueError: no such model")


def test_a_server_that_does_not_become_ready_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(server_process, "time", TimeOfProgram(tmp_path))
    with pytest.raises(ServingError, match=r"not ready after 0\.6 s \(http://.*--timeout_s"):
        process_of(tmp_path, "unhealthy", 0.6).__enter__()
    assert left_running(tmp_path) == []


def test_the_error_of_a_request_is_explained_by_the_servers_output(tmp_path, monkeypatch):
    monkeypatch.setattr(server_process, "CRASH_SEEN_S", 0.2)
    with process_of(tmp_path) as process:
        refused = ServingError("HTTP 400")
        assert process.explained(refused) is refused, "the server is not to blame"
        assert str(process.explained(ServerFault("HTTP 500"))).endswith("(--logs keeps all):\nloading the weights")
        monkeypatch.setattr(server_process, "CRASH_SEEN_S", 60.0)
        os.kill(running(tmp_path)[0], signal.SIGKILL)
        assert "ended during the measurement (signal 9)" in str(process.explained(ServerFault("closed")))


def test_what_cannot_be_started_and_a_port_in_use_are_named(tmp_path):
    endpoint = VllmEndpoint("http://localhost", 1.0)
    with pytest.raises(ServingError, match="No such file or directory; name the Python of vLLM's environment with --python"):
        ServerProcess([str(tmp_path / "none")], endpoint, 1.0).__enter__()
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServingError, match=f"--port {port} cannot be used"):
            check_port(port)
    check_port(free_port())
