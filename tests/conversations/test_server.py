"""Servers that cannot be used are named before the first question, and an answer counts only if it is whole."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from engine.config.strict import ConfigError
from engine.conversations.server import Server, ServerReply, as_sent, read_reply, served_model
from engine.data.messages import BadSample
from tests.conversations.chat_server import completion, say, serving, stop

REQUEST = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.0, "max_tokens": 8}
CALL = {"id": "c0", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky ü"}'}}
READ_CALL = CALL | {"function": {"name": "look", "arguments": {"at": "sky ü"}}}
TIMEOUT_S = 60.0  # for an answer, which may take its time


def ask(address: str, call: Callable[[Server], Awaitable[Any]], attempts: int = 1) -> Any:
    """The result of `call` with a server."""

    async def one() -> Any:
        server = Server(address, attempts, TIMEOUT_S, "none")
        try:
            return await call(server)
        finally:
            await server.close()

    return asyncio.run(one())


def model_of(*addresses: str, wanted: str | None = None) -> str:
    async def check() -> str:
        servers = [Server(address, 1, TIMEOUT_S, "none") for address in addresses]
        try:
            return await served_model(servers, wanted)
        finally:
            for server in servers:
                await server.close()

    return asyncio.run(check())


def test_the_model_is_the_one_that_is_wanted_or_the_only_one():
    with serving() as first, serving() as second:
        assert model_of(first.address, second.address) == "tiny"
        first.models = ["other", "tiny", "adapter"]
        assert model_of(first.address, second.address, wanted="tiny") == "tiny"
        with pytest.raises(ConfigError, match=f"regenerate.model = null: {first.address} serves other, tiny, adapter; name"):
            model_of(first.address, second.address)
        with pytest.raises(ConfigError, match=f"regenerate.model = adapter: {second.address} serves tiny; name"):
            model_of(first.address, second.address, wanted="adapter")
        first.models = ["other"]
        with pytest.raises(ConfigError, match=f"these serve {first.address} other, {second.address} tiny"):
            model_of(first.address, second.address)
        first.models = []
        with pytest.raises(ConfigError, match="serves nothing"):
            model_of(first.address)


def test_a_server_that_does_not_answer_is_named():
    with serving() as server, serving() as well:
        stop(server)
        with pytest.raises(ConfigError, match=f"{server.address}/models does not answer .*; start the server"):
            model_of(well.address, server.address)
        with pytest.raises(ConfigError, match="/models does not answer .404: .*Not Found.*fix its address"):
            model_of(well.address.removesuffix("/v1"))
        well.models_answer = {"data": ["no object"]}
        with pytest.raises(ConfigError, match="/models does not answer .expected a list of models, got TypeError"):
            model_of(well.address)


def test_a_request_is_sent_as_often_as_attempts_says():
    with serving() as server:
        server.fault_of = lambda request: "500" if len(server.requests) < 3 else None
        with pytest.raises(BadSample, match="no answer from the server: 500: the engine fell over"):
            ask(server.address, lambda client: client.reply(REQUEST), attempts=2)
        assert len(server.requests) == 2
        server.requests.clear()
        assert ask(server.address, lambda client: client.reply(REQUEST), attempts=3).message["content"] == say(REQUEST)
        assert len(server.requests) == 3 and all(request == REQUEST for request in server.requests)


def test_it_waits_as_long_as_the_server_asks():
    with serving() as server:
        server.fault_of = lambda request: "429" if len(server.requests) == 1 else None
        server.retry_after = "1.1"
        start = time.monotonic()
        ask(server.address, lambda client: client.reply(REQUEST), attempts=2)
        assert 1.1 <= time.monotonic() - start < 30


@pytest.mark.parametrize("fault", ["500", "429", "stall", "close before", "close within"])
def test_requests_given_up_are_counted_until_the_next_answer(fault):
    with serving() as server:
        server.stall_s = 60.0

        async def counts(client: Server) -> list[int]:
            found = []
            for met in (fault, fault, None, fault):
                server.fault_of = lambda _, met=met: met
                client._client.timeout = 0.1 if met == "stall" else TIMEOUT_S
                try:
                    await client.reply(REQUEST)
                except BadSample as error:
                    assert error.reason == "no answer from the server"
                found.append(client.unanswered)
            return found

        assert ask(server.address, counts) == [1, 2, 0, 1]


def test_a_refusal_is_an_answer_in_the_server_s_words_and_is_not_asked_for_again():
    with serving() as server:
        server.answer = lambda request: (
            400,
            {"object": "error", "message": "context of 9000\ntokens is too long", "code": 400},
        )

        async def refused(client: Server) -> int:
            client.unanswered = 2
            with pytest.raises(BadSample, match="refused by the server: 400: context of 9000 tokens is too long$"):
                await client.reply(REQUEST)
            return client.unanswered

        assert ask(server.address, refused, attempts=4) == 0
        assert len(server.requests) == 1


def test_a_body_that_is_no_json_is_malformed():
    with serving() as server:
        server.fault_of = lambda request: "broken JSON"
        with pytest.raises(BadSample, match="malformed answer: expected JSON"):
            ask(server.address, lambda client: client.reply(REQUEST), attempts=3)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_reply_keeps_reasoning_and_tool_calls(name):
    reply = read_reply(completion(None, "tool_calls", 7, tool_calls=[CALL], **{name: "hm"}), 8)
    message = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [READ_CALL]}
    assert reply == ServerReply(message, 7)
    assert as_sent(reply.message)["tool_calls"] == [CALL], "and says it to the server as the server said it"
    plain = read_reply(completion("hello", reasoning_content=None, tool_calls=[]) | {"usage": None}, 8)
    assert plain == ServerReply({"role": "assistant", "content": "hello"}, 0)


def test_arguments_that_are_no_object_stay_as_they_were_said():
    for arguments in ('{"at": ', "[1]", "5", "", "[" * 100_000):
        call = {"function": {"name": "look", "arguments": arguments}}
        assert read_reply(completion("", tool_calls=[call]), 8).message["tool_calls"] == [call]
        assert as_sent({"role": "assistant", "tool_calls": [call]})["tool_calls"] == [call]


@pytest.mark.parametrize(
    "answer, reason",
    [
        (completion("cut", "length"), "reply longer than regenerate.max_new_tokens"),
        (completion("", "length"), "reply longer than regenerate.max_new_tokens"),
        (completion("cut", "abort"), "reply cut short"),
        (completion("cut", None), "reply cut short"),
        (completion(""), "empty reply"),
        (completion(" \n", reasoning=" "), "empty reply"),
        (completion(None), "empty reply"),
        (completion(5), "malformed answer"),
        (completion(["parts"]), "malformed answer"),
        (completion("half a pair \ud83d"), "malformed answer"),
        (completion("x", tool_calls=["look"]), "malformed answer"),
        (completion("x", tool_calls=[{"name": "look"}]), "malformed answer"),
        (completion("x") | {"choices": []}, "malformed answer"),
        (completion("x") | {"usage": 3}, "malformed answer"),
        ({}, "malformed answer"),
        ([], "malformed answer"),
        ("<html>", "malformed answer"),
        (None, "malformed answer"),
    ],
)
def test_an_answer_that_cannot_be_used_says_why(answer, reason):
    with pytest.raises(BadSample) as error:
        read_reply(answer, 8)
    assert error.value.reason == reason


@pytest.mark.parametrize("calls", [["look"], [{"function": None}], 5])
def test_a_sample_s_malformed_tool_call_is_no_crash(calls):
    with pytest.raises(BadSample, match="malformed tool call"):
        as_sent({"role": "assistant", "content": "", "tool_calls": calls})


def test_a_missing_package_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"needs the package openai: pip install 'draftspeed\[data\]'"):
        Server("http://127.0.0.1:1/v1", 1, 1.0, "none")


def test_no_message_repeats_a_password_or_a_key():
    async def check() -> None:
        server = Server("http://me:s3cr3t-word@127.0.0.1:9/v1", 1, 2.0, "s3cr3t-key")
        try:
            assert server._words(ValueError("wrong key s3cr3t-key")) == "wrong key <hidden>"
            await server.models()
        finally:
            await server.close()

    with pytest.raises(ConfigError, match="127.0.0.1:9/v1/models does not answer") as error:
        asyncio.run(check())
    assert "s3cr3t" not in str(error.value)
