"""A server that was started is always ended, and a failed start shows what the server printed."""

import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from engine.serving import server_process
from engine.serving.endpoint import VllmEndpoint
from engine.serving.http_stream import ServerFault, ServingError
from engine.serving.server_process import HOST, ServerProcess, check_port, free_port
from tests.serving.fake_server import program


def process_of(folder: Path, behaviour: str = "", timeout_s: float = 10.0) -> ServerProcess:
    port = free_port()
    command = [str(program(folder, behaviour)), "--port", str(port)]
    return ServerProcess(command, VllmEndpoint(f"http://{HOST}:{port}", 2.0), timeout_s)


def running(folder: Path) -> list[int]:
    """The processes of the program that still run."""
    found = []
    for pid in map(int, (folder / "pids").read_text().split()):
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            found.append(pid)
    return found


def test_a_server_is_ended_with_its_children_even_if_they_ignore_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr(server_process, "GRACE_S", 0.3)
    with pytest.raises(KeyboardInterrupt), process_of(tmp_path, "stubborn"):
        assert len(running(tmp_path)) == 2
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    time.sleep(0.1)
    assert running(tmp_path) == []


def test_a_server_that_ends_while_starting_shows_its_last_lines(tmp_path):
    with pytest.raises(ServingError) as caught:
        process_of(tmp_path, "dies").__enter__()
    message = str(caught.value)
    assert "ended while starting (exit code 1)" in message and "fix" in message
    assert message.endswith("loading the weights\nValueError: no such model")


def test_a_server_that_does_not_become_ready_is_ended(tmp_path):
    with pytest.raises(ServingError, match=r"not ready after 0\.6 s \(http://.*--timeout_s"):
        process_of(tmp_path, "unhealthy", 0.6).__enter__()
    assert running(tmp_path) == []


def test_the_error_of_a_request_is_explained_by_the_servers_output(tmp_path, monkeypatch):
    monkeypatch.setattr(server_process, "CRASH_SEEN_S", 0.2)
    with process_of(tmp_path) as process:
        refused = ServingError("HTTP 400")
        assert process.explained(refused) is refused, "the server is not to blame"
        assert str(process.explained(ServerFault("HTTP 500"))).endswith("(--logs keeps all):\nloading the weights")
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
