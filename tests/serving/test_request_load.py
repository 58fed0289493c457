"""A load keeps its number of requests open, and fails with the first request that fails."""

import threading
import time

import pytest

from engine.serving.endpoint import ReplySettings, SglangEndpoint
from engine.serving.http_stream import ServingError
from engine.serving.request_load import RequestLoad
from tests.serving.fake_server import reply_to, serving

PROMPTS = [[index, index + 1] for index in range(10)]


def test_replies_come_in_the_order_of_their_prompts_with_a_bounded_number_at_once():
    with serving() as server:
        server.step_s = 0.01
        server.first_together = threading.Barrier(4, timeout=60.0)
        result = RequestLoad(SglangEndpoint(server.url, 120.0), PROMPTS, 4, ReplySettings(7)).run()
        assert server.most_open == 4
    assert [list(reply.token_ids) for reply in result.replies] == [reply_to(prompt, 7) for prompt in PROMPTS]
    assert result.num_tokens == 70
    assert result.seconds >= max(reply.total_s for reply in result.replies)


def test_the_first_failure_ends_the_load():
    with serving() as server:
        server.fault = "400"
        with pytest.raises(ServingError, match="message of 400"):
            RequestLoad(SglangEndpoint(server.url, 60.0), PROMPTS, 2, ReplySettings(7)).run()
        time.sleep(0.05)
        assert len(server.requests) <= 3, "no request follows a failed one"
