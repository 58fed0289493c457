"""A server that the benchmark starts: it waits until the server is ready, and always ends it with all its processes."""

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from engine.host.processes import end_with_parent
from engine.host.telemetry import visible
from engine.serving.endpoint import Endpoint
from engine.serving.http_stream import ServerFault, ServingError

HOST = "127.0.0.1"
POLL_S = 0.1
LAST_LINES = 20  # of a server's output that a message shows
LAST_ERRORS = 5  # lines before these that name an error, because servers print much while they end
LAST_BYTES = 200_000  # of the output that are read for both
NAMES_AN_ERROR = re.compile(r"\w(Error|Exception)\b|\b(ERROR|CRITICAL|FATAL)\b")
GRACE_S = 8.0  # for the server after SIGTERM, and for what is left of its group
KILLED_WITHIN_S = 5.0
CRASH_SEEN_S = 2.0  # between a connection that breaks and the end of the process that held it


class ServerProcess:
    """A server as a context manager: it is started by entering, and ended by leaving with any exception or none.

    The server leads a process group of its own, so that the workers it starts end with it.
    command: program and arguments. timeout_s: time in seconds until it must be ready.
    log: file for its output; None = a temporary file. environment: None = that of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        endpoint: Endpoint,
        timeout_s: float,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self._log = log
        self._environment = environment
        self._files = ExitStack()
        self._output: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ServerProcess":
        """Start the server and wait until it is ready. Raises ServingError."""
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def explained(self, error: ServingError) -> ServingError:
        """Return the error of a request, with the server's output if the reason is there or the server has ended."""
        assert self._process is not None, "the server has been started"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CRASH_SEEN_S)
        if self._process.returncode is not None:
            return self._failure(f"ended during the measurement ({self._exit_text()})", "fix what its output names")
        if isinstance(error, ServerFault):
            return ServingError(f"{error}. {self._shown_output()}")
        return error

    def end(self) -> None:
        """End the server, which ends its workers in order, and then what is left of its group.

        Both get SIGTERM and `GRACE_S` seconds; SIGKILL follows.
        """
        process = self._process
        self._process = None
        if process is not None:
            try:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
                _signal_group(process.pid, signal.SIGTERM)
                _wait_for(lambda: not _group_members(process.pid), GRACE_S)
            finally:  # also after another Ctrl-C
                _signal_group(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(KILLED_WITHIN_S)
        self._output = None
        self._files.close()

    def _start(self) -> None:
        log = self._log
        if log is None:
            log = Path(self._files.enter_context(tempfile.TemporaryDirectory()), "server.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._output = self._files.enter_context(log.open("w+b"))
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=None if self._environment is None else dict(self._environment),
                start_new_session=True,
                preexec_fn=end_with_parent,  # should this process be killed, the server does not stay
            )
        except OSError as error:
            problem = f"{self.command[0]} cannot be started: {error.strerror}"
            advice = f"name the Python of {self.endpoint.name}'s environment with --python"
            raise ServingError(f"{problem}; {advice}") from error

    def _wait_until_ready(self) -> None:
        assert self._process is not None, "the server has been started"
        deadline = time.monotonic() + self.timeout_s
        answer = "no answer"
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._failure(f"ended while starting ({self._exit_text()})", self._advice_on_start())
            try:
                self.endpoint.check_health()
            except ServingError as error:
                answer = str(error).partition("; ")[0]
            else:
                if self._process.poll() is None:  # otherwise another server answers at this port
                    return
            time.sleep(POLL_S)
        raise self._failure(
            f"was not ready after {self.timeout_s:g} s ({answer})", "raise --timeout_s or fix its output's error"
        )

    def _advice_on_start(self) -> str:
        text = self.last_lines().lower()
        if "no module named" in text:
            return f"name the Python of {self.endpoint.name}'s environment with --python"
        if "address already in use" in text:
            return "name a free port with --port, or leave --port out"
        if "out of memory" in text:
            return "lower the server's share of memory with its arguments after --, or use a smaller target"
        return "fix what its output names, for example with server arguments after --"

    def last_lines(self) -> str:
        """Return the end of the server's output, after the last lines before it that name an error.

        Characters that a terminal would obey become visible.
        """
        assert self._output is not None, "the server has been started"
        size = os.fstat(self._output.fileno()).st_size
        start = max(0, size - LAST_BYTES)
        content = os.pread(self._output.fileno(), LAST_BYTES, start)
        lines = content.decode("utf-8", errors="replace").splitlines()
        errors = [line for line in lines[:-LAST_LINES] if NAMES_AN_ERROR.search(line)][-LAST_ERRORS:]
        gap = ["..."] if errors else []
        return "\n".join(visible(line) for line in [*errors, *gap, *lines[-LAST_LINES:]])

    def _exit_text(self) -> str:
        assert self._process is not None, "the server has been started"
        code = self._process.returncode
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _failure(self, problem: str, advice: str) -> ServingError:
        return ServingError(f"the {self.endpoint.name} server {problem}; {advice}. {self._shown_output()}")

    def _shown_output(self) -> str:
        output = self.last_lines()
        return f"The last lines of its output (--logs keeps all):\n{output}" if output else "It printed nothing."


def free_port() -> int:
    """Return the number of a port on which no program listens."""
    with closing(socket.socket()) as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def check_port(port: int) -> None:
    """Raise ServingError if a program listens on a port of this machine, or this user may not use it."""
    with closing(socket.socket()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            problem = f"--port {port} cannot be used: {error.strerror}"
            raise ServingError(f"{problem}; end the program that uses it, name another port, or leave --port out") from error


def _group_members(group: int) -> list[int]:
    """Return the processes of a group that still run; zombies do not."""
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
    return members


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _wait_for(is_done: Callable[[], bool], timeout_s: float) -> None:
    """Return when a condition holds, or after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not is_done() and time.monotonic() < deadline:
        time.sleep(POLL_S)
