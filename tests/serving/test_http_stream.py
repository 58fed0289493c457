"""Failures of a server are explained: what happened, and how to fix it."""

import socket
import time

import pytest

from engine.serving.http_stream import HttpClient, ServingError, check_url
from tests.serving.fake_server import CHUNK, serving

REQUEST = {"prompt": [1, 2], "max_tokens": 4}


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


def events(server, fault: str = "", timeout_s: float = 60.0, max_tokens: int = 4) -> list:
    server.fault = fault
    client = HttpClient(server.url, timeout_s, "a-long-key")
    try:
        return list(client.post_events("/v1/completions", REQUEST | {"max_tokens": max_tokens}))
    finally:
        client.close()


@pytest.mark.parametrize(
    ("fault", "facts"),
    [
        ("400", ("HTTP 400", "message of 400", "--max_new_tokens")),
        ("401", ("HTTP 401", "OPENAI_API_KEY")),
        ("500", ("HTTP 500", "message of 500", "server's output")),
        ("close", ("closed the connection", "server's output")),
        ("error event", ("CUDA error",)),
        ("not JSON", ("<html>", "--server")),
        ("no end", ("[DONE]",)),
    ],
)
def test_a_failed_request_is_explained(server, fault, facts):
    with pytest.raises(ServingError) as caught:
        events(server, fault)
    message = str(caught.value)
    assert message.startswith(f"{server.url}/v1/completions: ")
    assert [fact for fact in facts if fact not in message] == []


def test_a_request_has_a_deadline_over_all_its_events(server):
    with pytest.raises(ServingError, match=r"within 0\.3 s.*--request_timeout_s"):
        events(server, "stall", 0.3)
    server.step_s = 0.1  # between two events, which is less than the deadline
    num_events = 600
    start = time.perf_counter()
    with pytest.raises(ServingError, match=r"within 0\.15 s"):
        events(server, timeout_s=0.15, max_tokens=CHUNK * num_events)
    seconds = time.perf_counter() - start
    assert seconds < server.step_s * num_events / 2, "it does not read the stream to its end"
    server.step_s = 0.0


def test_a_connection_serves_several_requests_and_carries_the_key(server):
    server.fault = ""
    client = HttpClient(server.url, 60.0, "a-long-key")
    assert client.get_json("/version") == {"version": "1.2"}
    first = client._connection
    assert len(list(client.post_events("/v1/completions", REQUEST))) == 2
    assert len(list(client.post_events("/v1/completions", REQUEST))) == 2
    assert client._connection is first
    client.close()
    assert server.authorizations == {"Bearer a-long-key"}
    with pytest.raises(ServingError, match="expected JSON, found 'vllm|# HELP"):
        client.get_json("/metrics")
    with pytest.raises(ServingError, match="HTTP 404: Not Found"):
        client.get_text("/nothing")
    client.close()


def test_an_address_where_nothing_listens_is_refused(monkeypatch):
    def no_such_host(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ServingError, match="connection refused.*--url"):
            HttpClient(url, 60.0).get_text("/health")
    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)  # some networks answer for every name
    with pytest.raises(ServingError, match="cannot be reached: .*Name or service not known"):
        HttpClient("http://no-such-host.invalid", 60.0).get_text("/health")


@pytest.mark.parametrize("url", ["localhost:30000", "http://", "http://x:99999", "ftp://x"])
def test_what_is_no_address_is_named(url):
    with pytest.raises(ValueError, match="--url .*http://localhost:30000"):
        check_url(url, "--url")
