"""The command: killed as often as one likes it leaves each conversation once, and what is wrong is said before any request."""

import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.conversations.chat_server import ChatServer, answered, conversations, read_lines, serving, stop, write_lines
from tests.distributed import launch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "launcher/regenerate_data.py"
HANG_S = 120.0  # only a test that hangs ends after this time
TORN = b'{"line": 3, "sample": {"conv'


@pytest.fixture
def server():
    with serving() as one:
        yield one


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "regenerate.concurrency=4", *arguments]
    # a shell's background job ignores Ctrl-C, and so would all that it starts
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed)


def job(folder: Path, server: ChatServer) -> list[str]:
    options = {"inputs": folder / "chat.jsonl", "output": folder / "out.jsonl", "servers": server.address}
    return [f"regenerate.{key}={value}" for key, value in options.items()]


def num_done(folder: Path) -> int:
    partial = folder / "out.jsonl.partial"
    return max(0, partial.read_bytes().count(b"\n") - 1) if partial.exists() else 0


def wait_for(folder: Path, count: int, process: subprocess.Popen) -> None:
    """Until so many conversations are done, or the process is."""
    deadline = time.monotonic() + HANG_S
    while num_done(folder) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def expected_of(samples: list[dict]) -> list[dict]:
    return [answered(sample, f"chat-{number}") for number, sample in enumerate(samples, start=1)]


def test_killed_again_and_again_it_leaves_every_conversation_once(tmp_path, server):
    samples = conversations(100)
    generator = random.Random(0)
    stopped_at = []
    write_lines(tmp_path / "chat.jsonl", samples)
    server.delay_s = 0.03
    while len(stopped_at) < 7:
        process = start(*job(tmp_path, server))
        wait_for(tmp_path, num_done(tmp_path) + generator.randrange(12), process)
        time.sleep(generator.random() * 0.05)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        stopped_at.append(num_done(tmp_path))
        if stopped_at[-1] and generator.random() < 0.5:
            with (tmp_path / "out.jsonl.partial").open("ab") as file:
                file.write(TORN)
    assert stopped_at == sorted(stopped_at) and len(set(stopped_at)) > 4, "it was killed at many places and lost nothing"
    process = start(*job(tmp_path, server))
    printed, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, errors
    assert "  100/100  " in printed, "the progress goes on where it was"
    assert f"100 of 100 conversations: {100 - stopped_at[-1]} regenerated, {stopped_at[-1]} by earlier runs" in printed
    assert read_lines(tmp_path / "out.jsonl") == expected_of(samples)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "out.jsonl"]
    num_replies = sum(message["role"] == "assistant" for sample in samples for message in sample["conversations"])
    in_flight = 4 * 3 * len(stopped_at)
    assert num_replies <= len(server.requests) <= num_replies + in_flight, "what is done is not asked for again"


def test_ctrl_c_ends_it_with_one_line_and_it_goes_on(tmp_path, server):
    samples = conversations(40)
    write_lines(tmp_path / "chat.jsonl", samples)
    server.delay_s = 0.05
    process = start(*job(tmp_path, server))
    wait_for(tmp_path, 5, process)
    server.delay_s = 60.0  # whatever the signal takes to arrive, the rest is not done by then
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HANG_S)
    server.delay_s = 0.05
    done = num_done(tmp_path)
    assert process.returncode == 1 and 5 <= done < 40
    said = f"stopped by hand; {done} of 40 conversations are done, and the same command goes on from there"
    assert errors == f"regenerate_data.py: {said}\n"
    process = start(*job(tmp_path, server))
    printed, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 0 and f"{40 - done} regenerated, {done} by earlier runs" in printed, errors
    assert read_lines(tmp_path / "out.jsonl") == expected_of(samples)


def test_a_server_that_is_down_is_one_line(tmp_path, server):
    write_lines(tmp_path / "chat.jsonl", conversations(2))
    stop(server)
    process = start(*job(tmp_path, server), "regenerate.attempts=1")
    _, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 1 and errors.count("\n") == 1
    assert errors.startswith(f"regenerate_data.py: regenerate.servers: {server.address}/models does not answer")


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"inputs": "[]"}, r"regenerate.inputs = \[\]: expected JSONL files"),
        ({"inputs": "{tmp}/none.jsonl"}, r"regenerate.inputs = .*/none.jsonl: no such file"),
        ({"inputs": "{tmp}/empty.jsonl"}, r"regenerate.inputs = .*/empty.jsonl: the file is empty"),
        ({"inputs": "[{tmp}/chat.jsonl, {tmp}/../{name}/chat.jsonl]"}, "regenerate.inputs = .*: names a file twice"),
        ({"output": "null"}, "regenerate.output = null: expected the JSONL file"),
        ({"output": "{tmp}"}, "regenerate.output = .*: is a folder"),
        ({"output": "{tmp}/there.jsonl"}, "regenerate.output = .*: exists already; name another file or delete it"),
        ({"output": "{tmp}/../{name}/chat.jsonl"}, "regenerate.output = .*: is one of regenerate.inputs"),
        ({"inputs": "{tmp}/x.partial", "output": "{tmp}/x"}, "regenerate.output = .*: is one of regenerate.inputs"),
        ({"servers": "[]"}, r"regenerate.servers = \[\]: expected addresses such as"),
        ({"servers": "localhost:30000"}, "regenerate.servers = .*: expected addresses such as"),
        ({"servers": "http://localhost:port/v1"}, "regenerate.servers = .*: expected an address such as"),
        ({"servers": "http:///v1"}, "regenerate.servers = .*: expected an address such as"),
        ({"output": "/proc/none/out.jsonl"}, "/proc/none"),
        ({"timeout": "3"}, "did you mean 'regenerate.timeout_s'"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_request(change, problem, tmp_path, server):
    for name in ("chat.jsonl", "there.jsonl", "x.partial"):
        write_lines(tmp_path / name, conversations(2))
    write_lines(tmp_path / "empty.jsonl", ["", "  "])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options = dict(argument.split("=", 1) for argument in job(tmp_path, server))
    options |= {f"regenerate.{key}": text.format(tmp=tmp_path, name=tmp_path.name) for key, text in change.items()}
    result = launch([SCRIPT, *(f"{key}={value}" for key, value in options.items())])
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert re.search(problem, result.stderr), result.stderr
    assert not server.requests
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("key", "sent"), [("secret", "Bearer secret"), ("", "Bearer none")])
def test_servers_get_the_key_of_the_environment(tmp_path, server, monkeypatch, key, sent):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    write_lines(tmp_path / "chat.jsonl", conversations(2))
    _, error = start(*job(tmp_path, server)).communicate(timeout=HANG_S)
    assert len(read_lines(tmp_path / "out.jsonl")) == 2, error
    assert server.authorizations == {sent}
