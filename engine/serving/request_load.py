"""A load of concurrent requests on a server."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.serving.endpoint import Endpoint, ReplySettings, ServedReply

LOOK_S = 0.05  # between looks at the threads, so that signals are noticed


@dataclass(frozen=True)
class LoadResult:
    """Replies in the order of the requests, and the time in seconds from the first request to the last reply."""

    replies: list[ServedReply]
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(len(reply.token_ids) for reply in self.replies)


class RequestLoad:
    """Requests to one server, of which `batch` are open at any time until fewer are left.

    prompts: token ids per request.
    """

    def __init__(self, endpoint: Endpoint, prompts: Sequence[Sequence[int]], batch: int, settings: ReplySettings) -> None:
        self._endpoint = endpoint
        self._prompts = prompts
        self._settings = settings
        self._num_threads = min(batch, len(prompts))
        self._lock = threading.Lock()
        self._next = 0
        self._replies: dict[int, ServedReply] = {}
        self._end = 0.0
        self._error: Exception | None = None

    def run(self) -> LoadResult:
        """Send all requests and return the replies. Raises the first error of a request, without waiting for others."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._num_threads)]
        start = time.perf_counter()
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive() and self._error is None:
                    thread.join(LOOK_S)
        finally:
            with self._lock:
                self._next = len(self._prompts)  # no further requests
        if self._error is not None:
            raise self._error
        replies = [self._replies[index] for index in range(len(self._prompts))]
        return LoadResult(replies, self._end - start)

    def _work(self) -> None:
        """Send one request after another until none is left."""
        client = self._endpoint.client()
        try:
            while True:
                with self._lock:
                    index = self._next
                    self._next = index + 1
                if index >= len(self._prompts):
                    return
                reply = self._endpoint.generate(client, self._prompts[index], self._settings)
                with self._lock:
                    self._replies[index] = reply
                    self._end = max(self._end, time.perf_counter())
        except Exception as error:
            with self._lock:
                self._error = self._error or error
                self._next = len(self._prompts)
        finally:
            client.close()
