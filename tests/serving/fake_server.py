"""A real HTTP server that speaks the protocols of vLLM and SGLang, with faults; also a program that starts like theirs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 3  # tokens that a target forward yields with the draft, of which two were drafted
NUM_STEPS = 4  # drafted tokens per forward
ENDED_WITHIN_S = 30.0  # processes that are sent SIGKILL; the program's children would run for longer


def reply_to(prompt: list[int], count: int) -> list[int]:
    """Return the tokens of a reply; it depends on the prompt alone."""
    return [(7 * sum(prompt) + 11 * index) % 97 for index in range(count)]


class FakeServer(ThreadingHTTPServer):
    """drafts: whether it reports a draft. fault: what goes wrong; "" = nothing. step_s: time of a target forward.

    is_incremental: whether SGLang's events have the latest tokens only. odd_prompt: first token of the
    prompt whose reply differs. first_together: the first requests, as many as it has parties, wait for each other in
    it; None = no request waits.
    """

    request_queue_size = 128  # of connections that are not accepted yet; the default of 5 refuses a burst of them
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0, drafts: bool = True) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.drafts = drafts
        self.fault = ""
        self.step_s = 0.0
        self.is_incremental = False
        self.odd_prompt: int | None = None
        self.first_together: threading.Barrier | None = None
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.authorizations: set[str | None] = set()
        self.num_drafts = 0
        self.num_open = self.most_open = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeServer

    def do_GET(self) -> None:
        pages = {
            "/health": "",
            "/version": '{"version": "1.2"}',
            "/v1/models": '{"data": [{"id": "served"}]}',
            "/metrics": self.metrics(),
            "/get_server_info": json.dumps({"version": "0.5", "internal_states": [self.state()]}),
        }
        if self.server.fault == "unhealthy" and self.path == "/health":
            self.send(503, '{"error": {"message": "still loading"}}')
        elif self.path in pages:
            self.send(200, pages[self.path])
        else:
            self.send(404, '{"detail": "Not Found"}')

    def state(self) -> dict[str, Any]:
        return {"avg_spec_accept_length": 2.75} if self.server.drafts else {}

    def metrics(self) -> str:
        lines = ["# HELP vllm:num_requests_running Running.", 'vllm:num_requests_running{engine="0"} 0.0']
        if self.server.drafts:
            labels = 'engine="0",model_name="served"'
            count = self.server.num_drafts
            lines += [
                f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(count)}",
                f"vllm:spec_decode_num_drafts_created{{{labels}}} 1.79e+09",
                f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} {float(NUM_STEPS * count)}",
                f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} {float((CHUNK - 1) * count)}",
            ]
            for position in range(NUM_STEPS):
                accepted = float(count * (position < CHUNK - 1))
                name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                lines.append(f'{name}{{{labels},position="{position}"}} {accepted}')
        return "\n".join(lines)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append(request)
            number = len(server.requests)
            server.authorizations.add(self.headers["Authorization"])
            server.num_open += 1
            server.most_open = max(server.most_open, server.num_open)
        try:
            if server.first_together is not None and number <= server.first_together.parties:
                server.first_together.wait()
            self.answer(request)
        finally:
            with server.lock:
                server.num_open -= 1

    def answer(self, request: dict[str, Any]) -> None:
        is_vllm = self.path == "/v1/completions"
        prompt = request["prompt"] if is_vllm else request["input_ids"]
        fault = self.server.fault
        if fault == "crash":
            print("EngineDeadError: no memory\nthe engine core died", *range(30), sep="\n", flush=True)
            os._exit(3)
        if fault in ("400", "401", "500"):
            self.send(int(fault), json.dumps({"error": {"message": f"message of {fault}"}}))
            return
        if fault == "close":
            self.close_connection = True
            return
        if fault == "stall":
            time.sleep(1.5)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault == "error event":
            self.event({"error": {"message": "CUDA error", "code": 500}})
        elif fault == "not JSON":
            self.chunk(b"data: <html>\n\n")
        else:
            self.stream(is_vllm, prompt, request)
        if fault != "no end":
            self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def stream(self, is_vllm: bool, prompt: list[int], request: dict[str, Any]) -> None:
        """Send the reply: one token, which the forward over the prompt yields, and then some tokens per forward."""
        server = self.server
        count = request["max_tokens"] if is_vllm else request["sampling_params"]["max_new_tokens"]
        token_ids = [] if server.fault == "no tokens" else reply_to(prompt, count)
        if prompt[0] == server.odd_prompt:
            token_ids[-1] += 1
        stride = CHUNK if server.drafts else 1
        ends = [1, *range(1 + stride, count, stride), count]
        start = 0
        for num_verifies, end in enumerate(ends):
            time.sleep(server.step_s)
            latest = token_ids[start:end]
            if is_vllm:
                ids = {} if server.fault == "text only" else {"token_ids": latest}
                self.event({"choices": [{"index": 0, "text": "x" * len(latest), **ids}]})
            else:
                facts = {"completion_tokens": len(token_ids[:end]), "finish_reason": None}
                if end == count:
                    aborted = {"type": "abort", "message": "too long"}
                    facts["finish_reason"] = aborted if server.fault == "abort" else {"type": "length"}
                    if server.drafts:
                        facts["spec_verify_ct"] = num_verifies
                shown = latest if server.is_incremental else token_ids[:end]
                self.event({"text": "x", "output_ids": shown, "meta_info": facts})
            if end > 1 or count == 1:
                with server.lock:
                    server.num_drafts += 1
            start = end

    def event(self, value: dict[str, Any]) -> None:
        self.chunk(f"data: {json.dumps(value)}\n\n".encode())

    def chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def send(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(drafts: bool = True) -> Iterator[FakeServer]:
    """A server at work until the block is left."""
    server = FakeServer(drafts=drafts)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def program(folder: Path, behaviour: str = "") -> Path:
    """Write a program that takes the place of a Python interpreter, and starts a server where it is told to serve.

    behaviour: "" or a fault of the server; "dies", "hangs" or "stubborn" (it ignores SIGTERM, and has a child that does).
    """
    path = folder / f"python_{behaviour.replace(' ', '_') or 'of_server'}"
    lines = (
        f"#!{sys.executable}",
        "import sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "from tests.serving.fake_server import run_program",
        f"run_program({behaviour!r}, {str(folder)!r})",
    )
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path


def running(folder: Path) -> list[int]:
    """The processes of the programs of a folder that still run."""
    found = []
    for pid in map(int, (folder / "pids").read_text().split()):
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def left_running(folder: Path) -> list[int]:
    """The processes of the programs of a folder that do not end, although they had `ENDED_WITHIN_S` seconds."""
    deadline = time.monotonic() + ENDED_WITHIN_S
    while running(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    return running(folder)


def run_program(behaviour: str, folder: str) -> None:
    """Be a server, as the command line says; its processes are listed in a file."""
    words = sys.argv[1:]
    pids = Path(folder, "pids")
    with pids.open("a") as file:
        file.write(f"{os.getpid()}\n")
    with Path(folder, "commands").open("a") as file:
        file.write(json.dumps(words) + "\n")
    print("loading the weights", flush=True)
    if behaviour == "dies":
        sys.exit("ValueError: no such model")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "60"])  # it inherits the signal that is ignored
        with pids.open("a") as file:
            file.write(f"{child.pid}\n")
    if behaviour == "hangs":
        time.sleep(60)
    drafts = "--speculative-config" in words or "--speculative-algorithm" in words
    server = FakeServer(int(words[words.index("--port") + 1]), drafts)
    server.fault = behaviour
    server.serve_forever()
