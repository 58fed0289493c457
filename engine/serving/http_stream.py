"""HTTP requests to a server whose replies arrive as a stream of events, with the standard library only.

Every failure becomes a `ServingError`, which says what happened and how to fix it.
"""

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from engine.config.secret_values import hidden_in_text

LONGEST_MESSAGE = 500  # characters of a server's message that are shown
DONE = "[DONE]"  # data of the last event of a stream
ADVICE = {
    400: "change --max_new_tokens, the prompts or the server's arguments as the message says",
    401: "set OPENAI_API_KEY to the key of the server",
    403: "set OPENAI_API_KEY to a key that the server accepts",
    404: "check the address, and that --server names the program that runs there",
    422: "check that --server names the program that runs there, and that its version is recent",
    429: "use a smaller --batch, or raise the server's limit of requests",
    503: "wait until the server is ready, or use a smaller --batch",
}


class ServingError(ValueError):
    """A server that cannot be measured; the message says what happened and how to fix it."""


class ServerFault(ServingError):
    """A failure whose reason is in the server's output."""


class HttpClient:
    """One connection to a server, which is reused for one request after another. It is not shared by threads.

    url: address of the server, without a path. timeout_s: time in seconds that a whole request may take.
    api_key: sent as a bearer token, unless it is empty.
    """

    def __init__(self, url: str, timeout_s: float, api_key: str = "") -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._api_key = api_key
        self._connection: http.client.HTTPConnection | None = None

    def get_text(self, path: str) -> str:
        """Return the body of a page. Raises ServingError."""
        deadline = time.perf_counter() + self.timeout_s
        try:
            body = self._open("GET", path, None, deadline).read()
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error, path) from error
        return body.decode("utf-8", errors="replace")

    def get_json(self, path: str) -> Any:
        """Return the value of a JSON page. Raises ServingError."""
        text = self.get_text(path)
        try:
            return json.loads(text)
        except ValueError as error:
            found = shortened(text, self._api_key)
            raise ServingError(f"{self.url}{path}: expected JSON, found {found!r}; {ADVICE[404]}") from error

    def post_events(self, path: str, content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Send a request and yield the events of its reply as they arrive, without the final `[DONE]`.

        Raises ServingError if the server refuses the request, reports an error within the stream,
        ends the stream early, or needs longer than `timeout_s`.
        """
        deadline = time.perf_counter() + self.timeout_s
        try:
            response = self._open("POST", path, json.dumps(content).encode(), deadline)
            while True:
                self._limit(deadline)
                line = response.readline()
                if not line:
                    break
                field, _, data = line.decode("utf-8", errors="replace").partition(":")
                data = data.strip()
                if field != "data":
                    continue
                if data == DONE:
                    response.read()  # the connection can serve another request
                    return
                yield self._event(data, path)
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error, path) from error
        self.close()
        raise ServerFault(
            f"{self.url}{path}: the stream ended without {DONE}, so a reply is incomplete; "
            f"look for an error in the server's output, and check that --server names the program that runs there"
        )

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self, method: str, path: str, body: bytes | None, deadline: float) -> http.client.HTTPResponse:
        """Send a request and return the response, of status 200. Raises ServingError for another status."""
        if self._connection is None:
            address = urlsplit(self.url)
            assert address.hostname is not None, "the caller has checked the address"
            kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
            self._connection = kind(address.hostname, address.port)
        headers = {"Content-Type": "application/json", "Accept": "*/*"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        self._connection.timeout = max(0.001, deadline - time.perf_counter())
        self._limit(deadline)
        prefix = urlsplit(self.url).path
        self._connection.request(method, prefix + path, body, headers)
        self._limit(deadline)
        response = self._connection.getresponse()
        if response.status != 200:
            message = _message(response.read())
            self.close()
            raise self._refusal(response.status, path, message)
        return response

    def _limit(self, deadline: float) -> None:
        """Let the next read or write fail at the deadline. Raises TimeoutError if it has passed."""
        left_s = deadline - time.perf_counter()
        if left_s <= 0:
            raise TimeoutError
        socket = None if self._connection is None else self._connection.sock
        if socket is not None:
            socket.settimeout(left_s)

    def _event(self, data: str, path: str) -> Mapping[str, Any]:
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            self.close()
            found = shortened(data, self._api_key)
            raise ServingError(f"{self.url}{path}: expected an event in JSON, found {found!r}; {ADVICE[404]}")
        if event.get("error") or event.get("object") == "error":
            self.close()
            message = shortened(_message(data.encode()), self._api_key)
            raise ServerFault(f"{self.url}{path}: the server reported an error: {message}; look into the server's output")
        return event

    def _refusal(self, status: int, path: str, message: str) -> ServingError:
        general = "look for the reason in the server's output" if status >= 500 else ADVICE[404]
        found = shortened(message, self._api_key) or "no message"
        kind = ServerFault if status >= 500 else ServingError
        return kind(f"{self.url}{path}: HTTP {status}: {found}; {ADVICE.get(status, general)}")

    def _failure(self, error: Exception, path: str) -> ServingError:
        """Return the error of a connection, explained."""
        self.close()
        kind: type[ServingError] = ServingError
        if isinstance(error, TimeoutError):
            problem = f"no complete reply within {self.timeout_s:g} s"
            advice = "raise --request_timeout_s, or use a smaller --batch or --max_new_tokens"
        elif isinstance(error, ConnectionRefusedError):
            problem = "connection refused: no program listens at this address"
            advice = "start the server, or fix --url or --plain_url"
        elif isinstance(error, ConnectionError | http.client.HTTPException):
            problem = f"the server closed the connection before its reply was complete ({type(error).__name__})"
            advice = "look for the reason in the server's output"
            kind = ServerFault
        else:
            problem = f"cannot be reached: {error}"
            advice = "fix --url or --plain_url, or the network"
        return kind(f"{self.url}{path}: {problem}; {advice}")


def check_url(url: str, option: str) -> None:
    """Raise ValueError, naming the option, if a text is not the address of a server."""
    try:
        address = urlsplit(url)
        is_url = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(f"{option} {hidden_in_text(url)}: expected the address of a server, such as http://localhost:30000")


def shortened(text: str, api_key: str = "") -> str:
    """Return a server's text on one line, without the key and not longer than `LONGEST_MESSAGE`."""
    line = " ".join(text.split())
    return hidden_in_text(line[:LONGEST_MESSAGE], api_key)


def _message(body: bytes) -> str:
    """Return the message within a server's answer, or the whole answer if it has none."""
    text = body.decode("utf-8", errors="replace")
    try:
        value = json.loads(text)
    except ValueError:
        return text
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value)
