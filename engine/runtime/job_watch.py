"""The watch over all ranks of a job: it ends them soon after one has died, stopped or hung, and names the cause.

A thread of every rank is connected to rank 0 and sends it a report each second. Without this, the
other ranks would wait in a collective until its timeout, and fail with the message of a library.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psutil
from torch import distributed

from engine.runtime.progress import Progress
from engine.runtime.stacks import Stacks, find_causes, own_stacks

TICK_S = 1.0  # time between two reports of a rank
SILENT_IN_STEPS_S = 20.0  # time without a report after which a rank that trains counts as stopped
SILENT_S = 120.0  # in other work, in which a library may keep Python's interpreter busy for a while
SECONDS_FOR_RANK_0 = 2.0  # in which rank 0 may fail for the same reason, so that the reason is printed once
SECONDS_FOR_STACKS = 3.0  # in which ranks answer where they are
MOST_BYTES = 1 << 22  # of a message
MOST_BYTES_UNVERIFIED = 1 << 12  # of a message before a connection has sent the token of the job
MOST_NAMED = 8  # ranks in a message
SECONDS_OF_LAST_ACTIONS = 2.0  # for the functions of `before_end`, and for each last line, which may have no reader
SECONDS_OF_ONE_SIGNAL = 5.0  # a terminal and a launcher may both pass on the same signal
ENDED = 1  # exit code of a rank that the watch ends
KEY = "job_watch"  # of the address of rank 0 in the store
LAUNCHERS = ("deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch")
RUNNERS = ("bin/deepspeed", "deepspeed.launcher.runner")


@dataclass(frozen=True)
class Job:
    """Facts about the job that a watch needs.

    rank, size, local_rank: of this process, in the whole job. command: name of the command, for messages.
    host: address of rank 0. stacks_folder: where stacks are written if a rank hangs.
    role: of this rank, such as "target rank 0", if not all ranks do the same.
    """

    rank: int
    size: int
    local_rank: int
    command: str
    host: str
    stacks_folder: Path
    role: str = ""


@dataclass(frozen=True)
class ProcessName:
    """A process of a job, by which others name it and can end it.

    created_s: time at which it was started. role: of its rank, such as "target rank 0", or "".
    """

    host: str
    pid: int
    created_s: float
    role: str

    @classmethod
    def own(cls, role: str) -> "ProcessName":
        """Return the name of this process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), role)

    def __str__(self) -> str:
        process = f"process {self.pid} on {self.host}"
        return f"{self.role}, {process}" if self.role else process

    def kill(self) -> None:
        """End the process if it runs on this machine; a stopped one does not end by itself."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if self.host == socket.gethostname() and process.create_time() == self.created_s:
                process.kill()


class Connection:
    """A socket to another rank, over which JSON objects travel, one per line.

    is_closed: whether the other side has closed it. most_bytes: of a message that is taken.
    """

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.link.settimeout(TICK_S)
        self.is_closed = False
        self.most_bytes = MOST_BYTES
        self._heard_s = time.monotonic()
        self._received = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message. Raises nothing: that the other rank has ended is seen when receiving."""
        with self._sending, suppress(OSError):
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived, and set `is_closed` if they are the last."""
        try:
            data = self.link.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        *lines, self._received = (self._received + data).split(b"\n")
        self._heard_s = time.monotonic()
        self.is_closed = not data or len(self._received) > self.most_bytes
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):  # not from a rank
            self.is_closed = True
            return []
        return [message for message in messages if isinstance(message, dict)]

    @property
    def silent_s(self) -> float:
        """Time since anything arrived."""
        return time.monotonic() - self._heard_s

    def restart_silence(self) -> None:
        """Begin to count the time without a message again."""
        self._heard_s = time.monotonic()


class JobWatch:
    """The watch of one rank. Use `open_watch`; a job of one rank has one too, for signals and the launcher.

    `leave` ends it when the work of this rank is done, `fail` when this rank has failed.
    """

    def __init__(self, job: Job, progress: Progress) -> None:
        """Create a watch. progress: what the main thread does."""
        self.job = job
        self.progress = progress
        self._launchers = own_launchers()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="job-watch", daemon=True)
        self._is_over = threading.Event()
        self._signals: socket.socket | None = None
        self._wakeup: socket.socket | None = None
        self._signalled_s: float | None = None  # time of the first signal
        self._taken: tuple[int, ...] = ()  # numbers of the signals that are requests

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def take_signals(self, numbers: Sequence[signal.Signals]) -> None:
        """Take signals as requests to stop after the current step; call it in the main thread, before `start`.

        A second signal, or one outside of training, ends the job at once.
        """
        self._signals, self._wakeup = socket.socketpair()
        self._signals.setblocking(False)
        self._wakeup.setblocking(False)
        self._taken = tuple(int(number) for number in numbers)
        for number in numbers:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._signals, selectors.EVENT_READ, self._read_signals)

    def leave(self) -> None:
        """End the watch: the work of this rank is done."""
        self._is_over.set()
        self._say_goodbye()
        self._thread.join(3 * TICK_S)

    def fail(self, text: str, code: int = ENDED) -> None:
        """End the other ranks, because of an error of this rank. This process may end when it returns.

        code: their exit code, if this is rank 0.
        """
        self._is_over.set()

    def wait_for_cause(self, seconds: float) -> None:
        """Wait for the watch to end this process, if another rank has failed before this one."""
        if self.job.size > 1:
            self._is_over.wait(seconds)

    def _ask_to_stop(self, reason: str, code: int) -> None:
        """Let the job stop after the current step, or at once outside of training. code: exit code in this case."""

    def _say_goodbye(self) -> None:
        """Tell other ranks that this one has finished."""

    def _report(self) -> None:
        """Exchange reports with other ranks; called each `TICK_S`."""

    def _is_done(self) -> bool:
        return self._is_over.is_set()

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # a job without a watch would not be ended by what it watches for
            self._write(f"rank {self.job.rank}: the watch over the job has failed: {type(error).__name__}: {error}")
            end_at_once(ENDED)

    def _watch(self) -> None:
        next_report_s = time.monotonic()
        while not self._is_done():
            for key, _ in self._selector.select(TICK_S / 4):
                key.data()
            late_s = time.monotonic() - next_report_s
            if late_s > 3 * TICK_S:  # this process was stopped, perhaps with the whole job
                self._restart_silence()
            if late_s >= 0:
                next_report_s = time.monotonic() + TICK_S
                self._look_for_launchers()
                self._report()

    def _restart_silence(self) -> None:
        """Begin to count the silence of other ranks again."""

    def _read_signals(self) -> None:
        assert self._signals is not None
        for number in self._signals.recv(64):
            if number not in self._taken or self._is_over.is_set():
                continue
            name = signal.Signals(number).name
            now_s = time.monotonic()
            if self._signalled_s is None:
                self._signalled_s = now_s
                self._ask_to_stop(name, 128 + number)
            elif now_s - self._signalled_s > SECONDS_OF_ONE_SIGNAL:
                self._write(f"rank {self.job.rank}: {name} after an earlier signal, ends at once")
                end_at_once(128 + number)

    def _look_for_launchers(self) -> None:
        """Ask for a stop if the launcher has ended."""
        if not all(launcher.is_parent() for launcher in self._launchers):
            self._launchers = []
            self._ask_to_stop("the end of the launcher", ENDED)

    def _limit_s(self, in_steps: bool) -> float:
        return SILENT_IN_STEPS_S if in_steps else SILENT_S

    def _write(self, text: str) -> None:
        def write() -> None:
            with suppress(OSError, ValueError):  # the launcher that reads it may have ended
                sys.stderr.write(f"{self.job.command}: {text}\n")
                sys.stderr.flush()

        _run_briefly(write)


class RankWatch(JobWatch):
    """The watch of a rank other than 0."""

    def __init__(self, job: Job, progress: Progress, store: distributed.Store, timeout_s: float) -> None:
        """Connect to rank 0. Raises ValueError if it cannot be reached."""
        super().__init__(job, progress)
        store.wait([KEY], timedelta(seconds=timeout_s))
        host, port, token, main = json.loads(store.get(KEY))
        self._main_process = ProcessName(**main)
        try:
            link = socket.create_connection((host, port), timeout=timeout_s)
        except OSError as error:
            problem = f"rank {job.rank} cannot reach rank 0 at {host}, port {port}: {error}"
            raise ValueError(f"{problem}. Allow connections on all ports between the nodes of the job") from error
        self._main = Connection(link)
        self._main_has_left = False
        self._main.send(token=token, rank=job.rank, process=vars(ProcessName.own(job.role)))
        self._selector.register(link, selectors.EVENT_READ, self._hear)

    def fail(self, text: str, code: int = ENDED) -> None:
        self._main.send(failed=text)
        self._is_over.wait(SECONDS_FOR_RANK_0 + 3 * TICK_S)
        self._is_over.set()

    def _ask_to_stop(self, reason: str, code: int) -> None:
        self._main.send(stop=reason, code=code)

    def _say_goodbye(self) -> None:
        self._main.send(left=True)

    def _report(self) -> None:
        self._main.send(in_steps=self.progress.in_steps, is_stuck=self.progress.is_stuck)
        silent_s = self._main.silent_s
        if silent_s > self._limit_s(self.progress.in_steps) and not self._main_has_left:
            self._main_process.kill()
            self._lose_main(f"has not answered for {silent_s:.0f} s: it is stopped, or its node is")

    def _hear(self) -> None:
        for message in self._main.receive():
            if "end" in message:
                end_at_once(message["end"])
            elif "where" in message:
                self._main.send(stacks=vars(own_stacks(self.progress)))
            elif "left" in message:
                self._main_has_left = True
        if self._main.is_closed:
            self._selector.unregister(self._main.link)
            if not self._main_has_left and not self._is_over.is_set():
                self._lose_main("has ended without a message: it was killed, or ran out of memory")

    def _restart_silence(self) -> None:
        self._main.restart_silence()

    def _lose_main(self, problem: str) -> NoReturn:
        if self.job.rank == 1 or self.job.local_rank == 0:
            self._write(f"rank 0 ({self._main_process}) {problem}. The job ends")
        end_at_once(ENDED)


@dataclass
class _Peer:
    """Another rank, as rank 0 knows it.

    rank, process: None until it has said who it is. in_steps, is_stuck: of its last report.
    has_left: whether it has finished, or is not waited for any more.
    """

    connection: Connection
    rank: int | None = None
    process: ProcessName | None = None
    in_steps: bool = False
    is_stuck: bool = False
    has_left: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.process})"


class MainWatch(JobWatch):
    """The watch of rank 0, which hears all other ranks and decides when the job must end."""

    def __init__(self, job: Job, progress: Progress, store: distributed.Store | None, timeout_s: float) -> None:
        """Listen for the other ranks.

        store: in which they find the address; None = there are no others.
        timeout_s: after which a rank that has not connected is missing.
        """
        super().__init__(job, progress)
        self._peers: list[_Peer] = []
        self._failure: str | None = None  # the first error that another rank has reported
        self._failed_s = 0.0
        self._stacks: dict[int, Stacks] | None = None  # while they are collected
        self._asked_s = 0.0
        self._began_s = time.monotonic()
        self._timeout_s = timeout_s
        if store is not None:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._listener = socket.create_server(("", 0), family=family, backlog=job.size, dualstack_ipv6=both)
            self._token = secrets.token_hex(16)
            address = [job.host, self._listener.getsockname()[1], self._token, vars(ProcessName.own(job.role))]
            store.set(KEY, json.dumps(address))
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def fail(self, text: str, code: int = ENDED) -> None:
        self._tell_all(end=code)
        super().fail(text)

    def _ask_to_stop(self, reason: str, code: int) -> None:
        if not self.progress.in_training:
            self._end_job(f"ended by {reason}", code)
        self.progress.ask_to_stop(reason)

    def _say_goodbye(self) -> None:
        self._tell_all(left=True)

    def _is_done(self) -> bool:
        return self._is_over.is_set() and all(peer.has_left for peer in self._peers)

    def _accept(self) -> None:
        try:
            link, _ = self._listener.accept()
        except OSError:  # it has gone already
            return
        peer = _Peer(Connection(link))
        peer.connection.most_bytes = MOST_BYTES_UNVERIFIED
        self._selector.register(link, selectors.EVENT_READ, lambda: self._hear(peer))

    def _hear(self, peer: _Peer) -> None:
        for message in peer.connection.receive():
            if peer.rank is not None:
                self._take(peer, peer.rank, message)
            elif message.get("token") == self._token:
                peer.rank = int(message["rank"])
                peer.process = ProcessName(**message["process"])
                peer.connection.most_bytes = MOST_BYTES
                self._peers.append(peer)
            else:
                peer.connection.is_closed = True
        if peer.connection.is_closed:
            self._selector.unregister(peer.connection.link)
            peer.connection.link.close()
            if peer.rank is not None and not peer.has_left:
                peer.has_left = True
                if self._is_over.is_set():  # it ends because this rank does
                    return
                self._end_job(self._failure or f"{peer.name} has ended without a message: it was killed, or ran out of memory")

    def _take(self, peer: _Peer, rank: int, message: dict[str, Any]) -> None:
        """Take a message of another rank."""
        if "failed" in message:
            if self._failure is None:
                self._failure = f"rank {rank}: {message['failed']}"
                self._failed_s = time.monotonic()
        elif "stacks" in message:
            if self._stacks is not None:
                self._stacks[rank] = Stacks(**message["stacks"])
        elif "left" in message:
            peer.has_left = True
        elif "stop" in message:
            self._ask_to_stop(message["stop"], message["code"])
        else:
            peer.in_steps = message["in_steps"]
            peer.is_stuck = message["is_stuck"]

    def _report(self) -> None:
        if self._is_over.is_set():
            return
        self._tell_all(alive=True)
        missing = set(range(1, self.job.size)) - {peer.rank for peer in self._peers}
        if missing and time.monotonic() - self._began_s > self._timeout_s:
            named = ", ".join(str(rank) for rank in sorted(missing)[:MOST_NAMED])
            advice = "Allow connections on all ports between the nodes of the job"
            self._end_job(f"{len(missing)} ranks have not connected to rank 0 ({named}). {advice}")
        if self._failure is not None and time.monotonic() - self._failed_s > SECONDS_FOR_RANK_0:
            self._end_job(self._failure)
        for peer in self._peers:
            if peer.connection.silent_s > self._limit_s(peer.in_steps) and not peer.has_left:
                self._end_silent_rank(peer)
        self._look_for_hang()

    def _restart_silence(self) -> None:
        for peer in self._peers:
            peer.connection.restart_silence()

    def _end_silent_rank(self, peer: _Peer) -> NoReturn:
        """End a job of which one rank is stopped."""
        if peer.process is not None:
            peer.process.kill()
        problem = f"has not answered for {peer.connection.silent_s:.0f} s: it is stopped, or its node is"
        self._end_job(f"{peer.name} {problem}")

    def _look_for_hang(self) -> None:
        is_stuck = self.progress.is_stuck or any(peer.is_stuck for peer in self._peers)
        if not is_stuck:
            self._stacks = None
        elif self._stacks is None:
            self._stacks = {0: own_stacks(self.progress)}
            self._asked_s = time.monotonic()
            self._tell_all(where=True)
        elif time.monotonic() - self._asked_s > SECONDS_FOR_STACKS:
            self._end_hung_job(self._stacks)

    def _end_hung_job(self, stacks: dict[int, Stacks]) -> NoReturn:
        for peer in self._peers:
            if peer.rank not in stacks and not peer.has_left:
                self._end_silent_rank(peer)
        causes = find_causes(stacks)
        named = ", ".join(f"rank {rank} ({stacks[rank].where})" for rank in causes[:MOST_NAMED])
        if len(causes) > MOST_NAMED:
            named += f" and {len(causes) - MOST_NAMED} more"
        folder = self.job.stacks_folder
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            for rank, own in stacks.items():
                (folder / f"rank_{rank}.txt").write_text(own.text, encoding="utf-8")
        problem = f"no progress for {self.progress.seconds:.0f} s; the job waits for {named}"
        advice = f"The stacks of all ranks are in {folder}. If a step may take this long, raise parallel.hang_s (0 = no limit)"
        self._end_job(f"{problem}. {advice}\n{stacks[causes[0]].text}")

    def _end_job(self, cause: str, code: int = ENDED) -> NoReturn:
        self._write(cause)
        self._tell_all(end=code)
        time.sleep(TICK_S / 4)  # lets the other ranks end before a launcher ends them one by one
        end_at_once(code)

    def _tell_all(self, **message: Any) -> None:
        for peer in self._peers:
            if not peer.has_left:
                peer.connection.send(**message)


def open_watch(job: Job, progress: Progress, store: distributed.Store | None, timeout_s: float) -> JobWatch:
    """Return the watch of this rank, which is not started yet; a collective of all ranks of a job.

    store: in which the ranks find each other; None in a job of one rank. timeout_s: how long to wait for rank 0.
    Raises ValueError if rank 0 cannot be reached.
    """
    if job.rank == 0:
        return MainWatch(job, progress, store if job.size > 1 else None, timeout_s)
    assert store is not None
    return RankWatch(job, progress, store, timeout_s)


@dataclass(frozen=True)
class Launcher:
    """A process without which this job must not run on, and the process that it has started."""

    pid: int
    child: psutil.Process

    def is_parent(self) -> bool:
        """Return whether it still is the parent of the process that it has started."""
        with suppress(psutil.Error):
            return self.child.ppid() == self.pid
        return False


def own_launchers() -> list[Launcher]:
    """Return the launcher that has started this process, and the runner that has started the launcher.

    A shell or another program that has started it may end before the job does.
    """
    own = psutil.Process()
    with suppress(psutil.Error):
        parent = own.parent()
        if parent is None or not _is_one_of(parent, LAUNCHERS):
            return []
        launchers = [Launcher(parent.pid, own)]
        runner = parent.parent()
        if runner is not None and _is_one_of(runner, RUNNERS):
            launchers.append(Launcher(runner.pid, parent))
        return launchers
    return []


def _is_one_of(process: psutil.Process, names: Sequence[str]) -> bool:
    return any(name in part for part in process.cmdline()[:4] for name in names)


_last_actions: list[Callable[[], None]] = []


def before_end(action: Callable[[], None]) -> None:
    """Let `end_at_once` call a function first, such as one that removes a temporary folder; its errors are ignored.

    It is called in a thread. The process ends after `SECONDS_OF_LAST_ACTIONS`, whether or not it has returned.
    """
    _last_actions.append(action)


def end_at_once(code: int) -> NoReturn:
    """End this process and those that it has started, without exit functions but those of `before_end`."""
    _run_briefly(_run_last_actions)
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    _run_briefly(_flush)
    os._exit(code)


def _run_last_actions() -> None:
    for action in _last_actions:
        with suppress(Exception):
            action()


def _flush() -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()


def _run_briefly(function: Callable[[], None]) -> None:
    """Run a function in a thread, and wait `SECONDS_OF_LAST_ACTIONS` for it at most."""
    thread = threading.Thread(target=function, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # Python is ending, or the system allows no more threads
        function()
    else:
        thread.join(SECONDS_OF_LAST_ACTIONS)
