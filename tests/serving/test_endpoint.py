"""Both protocols give the same tokens and the same acceptance."""

import pytest

from engine.serving.endpoint import ENDPOINTS, ReplySettings, joined
from engine.serving.http_stream import ServingError
from tests.serving.fake_server import CHUNK, reply_to, serving

PROMPT = [5, 6, 7]
SETTINGS = ReplySettings(1 + 4 * CHUNK, ignore_eos=True)


def generate(server, name: str, prompt=PROMPT):
    endpoint = ENDPOINTS[name](server.url + "/v1", 5.0)
    endpoint.prepare()
    endpoint.check_health()
    client = endpoint.client()
    try:
        before = endpoint.counters()
        reply = endpoint.generate(client, prompt, SETTINGS)
        return reply, endpoint.acceptance(before, endpoint.counters(), [reply])
    finally:
        client.close()


@pytest.mark.parametrize("name", sorted(ENDPOINTS))
@pytest.mark.parametrize("drafts", [True, False])
def test_tokens_times_and_acceptance_of_a_reply(name, drafts):
    with serving(drafts) as server:
        server.step_s = 0.05
        reply, acceptance = generate(server, name)
        assert list(reply.token_ids) == reply_to(PROMPT, SETTINGS.max_new_tokens)
        num_steps = 4 if drafts else 4 * CHUNK
        assert reply.first_token_s >= 0.05
        assert reply.total_s >= 0.05 * (1 + num_steps)
        assert reply.first_token_s <= reply.total_s - 0.025 * num_steps  # half: the client may read the first token late
        if drafts:
            assert acceptance.length == CHUNK, "the token of the prompt's forward does not count"
            assert acceptance.num_verifies == 4
        else:
            assert acceptance is None
        request = server.requests[-1]
        assert request.get("ignore_eos", request.get("sampling_params", {}).get("ignore_eos")) is True
        if drafts and name == "vllm":
            assert acceptance.accepted_per_position == (1.0, 1.0, 0.0, 0.0)
            assert request["model"] == "served"
        elif drafts:
            assert acceptance.own_average == 2.75
        assert ENDPOINTS[name](server.url, 5.0).version() in ("1.2", "0.5")


def test_sglang_may_send_only_the_latest_tokens():
    with serving() as server:
        server.is_incremental = True
        reply, _ = generate(server, "sglang")
        assert list(reply.token_ids) == reply_to(PROMPT, SETTINGS.max_new_tokens)


def test_lists_that_run_ahead_of_their_number_of_tokens_are_told_from_latest_tokens():
    assert joined([], [1, 2], 1) == [1, 2]
    assert joined([1, 2], [1, 2, 3, 4], 3) == [1, 2, 3, 4]
    assert joined([1, 2], [3], 3) == [1, 2, 3]
    assert joined([1, 2, 3], [], 3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "fault", "fact"),
    [
        ("vllm", "no tokens", "no tokens; its first token ends the sequence; pass --ignore_eos"),
        ("sglang", "no tokens", "no tokens"),
        ("vllm", "text only", "update vLLM to 0.10.2"),
        ("sglang", "abort", "aborted a request: too long"),
        ("vllm", "unhealthy", "HTTP 503: still loading"),
    ],
)
def test_an_unusable_reply_is_explained(name, fault, fact):
    with serving() as server:
        server.fault = fault
        with pytest.raises(ServingError, match=fact):
            generate(server, name)


def test_counters_of_several_engines_are_added(monkeypatch):
    lines = [
        'vllm:spec_decode_num_drafts_total{engine="0"} 2.0',
        'vllm:spec_decode_num_drafts_total{engine="1"} 3.0',
        'vllm:spec_decode_num_accepted_tokens_total{engine="0"} 4.0',
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 2.0',
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",position="0"} 3.0',
    ]
    endpoint = ENDPOINTS["vllm"]("http://localhost", 1.0)
    monkeypatch.setattr("engine.serving.http_stream.HttpClient.get_text", lambda self, path: "\n".join(lines))
    counters = endpoint.counters()
    acceptance = endpoint.acceptance({}, counters, [])
    assert (acceptance.length, acceptance.num_verifies, acceptance.accepted_per_position) == (1.8, 5, (1.0,))
    assert endpoint.acceptance(counters, counters, []).length is None, "no forward verified anything"
