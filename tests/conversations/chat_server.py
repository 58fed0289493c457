"""A real HTTP server that speaks OpenAI's protocol: its replies follow from the messages, its faults from a seed."""

import json
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import xxhash

from engine.config.data_section import DataSection, RegenerateSection
from engine.conversations.regenerate import Regeneration
from engine.host.telemetry import Telemetry

FAULTS = ("500", "429", "stall", "close before", "close within", "broken JSON")
MODEL = "tiny"
Request = dict[str, Any]


def say(request: Request) -> str:
    """What the server says to a request, other than to any other."""
    asked = {key: request.get(key) for key in ("messages", "tools", "chat_template_kwargs", "temperature", "max_tokens")}
    return f"w{xxhash.xxh3_64(json.dumps(asked, sort_keys=True).encode()).hexdigest()}"


def completion(content: str | None, finish_reason: str | None = "stop", num_tokens: int = 3, **rest: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **rest}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"completion_tokens": num_tokens},
    }


class ChatServer(ThreadingHTTPServer):
    """requests: all that came, in order of arrival; authorizations: what they came with.

    answer: what is said to one, as JSON or (status, JSON).

    fault_of: the fault that meets a request, None = it is answered. delay_s: time that a reply takes.
    """

    request_queue_size = 128  # of connections that are not accepted yet; the default of 5 refuses a burst of them
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = [MODEL]
        self.models_answer = None
        self.requests: list[Request] = []
        self.authorizations: set[str] = set()
        self.errors: list[str] = []
        self.num_answered = 0
        self.max_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.delay_s = 0.0
        self.stall_s = 2.0
        self.answer: Callable[[Request], Any] = lambda request: completion(say(request))
        self.fault_of: Callable[[Request], str | None] = lambda request: None
        self.retry_after = "0"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def fail_at_random(self, seed: int, share: float) -> None:
        """Meet that share of requests with faults, each as often as the others."""
        generator = random.Random(seed)
        deck = []

        def draw(request: Request) -> str | None:
            if generator.random() >= share:
                return None
            if not deck:
                deck.extend(generator.sample(FAULTS, len(FAULTS)))
            return deck.pop()

        self.fault_of = draw

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or gave up is no error here; whatever else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ChatServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            models = {"object": "list", "data": [{"id": model} for model in self.server.models]}
            self.send(200, self.server.models_answer or models)
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if len(content) < int(self.headers["Content-Length"]):
            self.close_connection = True  # the client was killed while it asked
            return
        request = json.loads(content)
        with self.server.lock:
            self.server.requests.append(request)
            self.server.authorizations.add(self.headers["Authorization"])
            self.server.at_once += 1
            self.server.max_at_once = max(self.server.max_at_once, self.server.at_once)
            fault = self.server.fault_of(request)
        self.server.closing.wait(self.server.delay_s)
        with self.server.lock:
            self.server.at_once -= 1
        self.meet(fault, request)

    def meet(self, fault: str | None, request: Request) -> None:
        if fault == "stall":
            self.server.closing.wait(self.server.stall_s)
        if fault in ("stall", "close before") or self.server.closing.is_set():
            self.close_connection = True
        elif fault == "500":
            self.send(500, {"error": {"message": "the engine fell over"}})
        elif fault == "429":
            self.send(429, {"error": {"message": "slow down"}}, {"Retry-After": self.server.retry_after})
        elif fault == "close within":
            self.send(200, self.server.answer(request), {"Content-Length": "100000"})
            self.close_connection = True
        elif fault == "broken JSON":
            self.send(200, json.dumps(self.server.answer(request))[:-20].encode())
        else:
            answer = self.server.answer(request)
            status, body = answer if isinstance(answer, tuple) else (200, answer)
            self.send(status, body)
            with self.server.lock:
                self.server.num_answered += 1

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        own = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, value in (own | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serving() -> Iterator[ChatServer]:
    """A server at work until the block is left, or `stop` ends it before."""
    server = ChatServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        stop(server)
    assert not server.errors, server.errors[0]


def stop(server: ChatServer) -> None:
    """The server is gone: whoever asks it from now on is refused the connection."""
    server.closing.set()
    server.shutdown()
    server.server_close()


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Samples of one to three questions with answers of someone else; some have a system turn, an id, other keys."""
    generator = random.Random(seed)
    samples = []
    for index in range(count):
        turns = [{"role": "system", "content": f"be {index}"}] if generator.random() < 0.3 else []
        for turn in range(generator.randint(1, 3)):
            turns += [{"role": "user", "content": f"question {index}.{turn} ü"}, {"role": "assistant", "content": "not ours"}]
        rest = {"id": f"own-{index}", "source": {"set": index}} if generator.random() < 0.5 else {}
        samples.append({**rest, "conversations": turns})
    return samples


def answered(sample: dict[str, Any], name: str, **settings: Any) -> dict[str, Any]:
    """The sample as it must come out, if every reply is `say` of what stands before it."""
    common = {"temperature": 0.0, "max_tokens": 4096} | settings
    told: list[dict[str, Any]] = []
    for message in sample["conversations"]:
        reply = {"role": "assistant", "content": say(common | {"messages": told})}
        told = [*told, reply if message["role"] == "assistant" else message]
    return {"id": name} | sample | {"conversations": told}


def write_lines(path: Path, samples: list[Any]) -> Path:
    lines = (sample if isinstance(sample, str) else json.dumps(sample, ensure_ascii=False) for sample in samples)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def regeneration(folder: Path, *servers: ChatServer, data: DataSection | None = None, **options: Any) -> Regeneration:
    """A job that reads chat.jsonl of a folder and writes out.jsonl there."""
    defaults = {"inputs": (str(folder / "chat.jsonl"),), "concurrency": 4, "attempts": 2, "timeout_s": 5.0}
    addresses = tuple(server.address for server in servers)
    section = RegenerateSection(output=str(folder / "out.jsonl"), servers=addresses, **defaults | options)
    return Regeneration(section, data or DataSection(), Telemetry(speaks=False))
