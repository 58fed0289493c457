"""Whatever servers do, every conversation comes out once, in order, with the target's replies to its own replies."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config.data_section import DataSection
from engine.config.strict import ConfigError
from engine.conversations.journal import JournalError
from engine.conversations.regenerate import Regeneration, Unfinished, partial_of, turns_to_answer
from tests.conversations.chat_server import (
    FAULTS,
    ChatServer,
    answered,
    completion,
    conversations,
    read_lines,
    regeneration,
    say,
    serving,
    stop,
    write_lines,
)

ANY_SHARE = DataSection(max_bad_share=1.0)


@pytest.fixture
def server():
    with serving() as one:
        yield one


def asks_about(request: dict[str, Any], *indices: int) -> bool:
    """Whether a request is of one of these conversations of `conversations`."""
    return any(f"question {index}." in message["content"] for index in indices for message in request["messages"])


def expected_of(samples: list[Any], left_out: tuple[int, ...] = (), **settings: Any) -> list[dict[str, Any]]:
    return [
        answered(sample, f"chat-{number}", **settings)
        for number, sample in enumerate(samples, start=1)
        if number - 1 not in left_out
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_the_servers_do_every_conversation_comes_out_once_and_in_order(seed, tmp_path):
    samples = conversations(40, seed)
    write_lines(tmp_path / "chat.jsonl", samples)
    met = []
    with serving() as first, serving() as second:
        for index, server in enumerate((first, second)):
            server.fail_at_random(seed + 10 * index, 0.25)
            draw = server.fault_of
            server.fault_of = lambda request, draw=draw: met.append(draw(request)) or met[-1]
        for _ in range(20):
            report = regeneration(tmp_path, first, second, data=ANY_SHARE, concurrency=8, attempts=4, timeout_s=0.5).run()
            written = read_lines(tmp_path / "out.jsonl")
            assert len(written) == 40 - report.num_left_out
            if not report.missing:
                break
        assert first.requests and second.requests
    assert written == expected_of(samples)
    assert set(met) == {*FAULTS, None}, "it was met by every fault"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "out.jsonl"]


def test_a_reply_answers_the_replies_before_it(tmp_path, server):
    sample = {"conversations": [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant", "user")]}
    write_lines(tmp_path / "chat.jsonl", [sample])
    regeneration(tmp_path, server).run()
    first, second = server.requests
    assert first["messages"] == [{"role": "user", "content": "x"}]
    replies = [say(first), say(second)]
    asked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": replies[0]}, {"role": "user", "content": "x"}]
    assert second["messages"] == asked
    (written,) = read_lines(tmp_path / "out.jsonl")
    assert written["conversations"] == [*asked, {"role": "assistant", "content": replies[1]}, {"role": "user", "content": "x"}]


def test_sharegpt_comes_out_as_roles_and_old_answers_leave_nothing_behind(tmp_path, server):
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "x", "reasoning_content": "y", "z": 1},
    ]
    write_lines(tmp_path / "chat.jsonl", [{"id": 7, "conversations": turns, "lang": "en"}])
    regeneration(tmp_path, server).run()
    reply = {"role": "assistant", "content": say(server.requests[0])}
    expected = {"id": 7, "conversations": [{"role": "user", "content": "hi"}, reply], "lang": "en"}
    assert read_lines(tmp_path / "out.jsonl") == [expected]


def test_tools_and_reasoning_travel_both_ways(tmp_path, server):
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if len(request["messages"]) == 1:
            return completion("first", reasoning="think")
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
        return completion(None, "tool_calls", tool_calls=[call])

    call = {"id": "c0", "type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "old"}
    result = {"role": "tool", "content": "blue", "tool_call_id": "c0"}
    user = {"role": "user", "content": "hi"}
    other = {"role": "assistant", "content": "not ours"}
    tools = [{"type": "function", "function": {"name": "look"}}]
    write_lines(tmp_path / "chat.jsonl", [{"tools": tools, "conversations": [user, other, user, calling, result, other]}])
    server.answer = answer
    data = DataSection(template_kwargs={"enable_thinking": True})
    report = regeneration(tmp_path, server, data=data, temperature=0.5, max_new_tokens=9).run()
    for request in server.requests:
        assert request["tools"] == tools and request["chat_template_kwargs"] == {"enable_thinking": True}
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("tiny", 0.5, 9)
    first = {"role": "assistant", "content": "first", "reasoning_content": "think"}
    as_text = [call | {"function": {"name": "look", "arguments": '{"at": "sky"}'}}]
    assert server.requests[1]["messages"] == [user, first, user, calling | {"tool_calls": as_text}, result]
    new_call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
    last = {"role": "assistant", "content": "", "tool_calls": [new_call]}
    (written,) = read_lines(tmp_path / "out.jsonl")
    assert written["conversations"] == [user, first, user, calling, result, last] and written["tools"] == tools
    assert (report.num_replies, report.kept_turns) == (2, 1) and "1 assistant turns kept" in report.summary()


def test_turns_that_tool_results_follow_or_that_nothing_was_asked_before_are_kept(tmp_path, server):
    def roles(text: str) -> list[dict[str, str]]:
        names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
        return [{"role": names[letter], "content": f"{letter}{index}"} for index, letter in enumerate(text)]

    cases = {"ua": [1], "sua": [2], "a": [], "saua": [3], "uatta": [4], "uat": [], "uatuata": [6], "uauaua": [1, 3, 5]}
    assert {text: list(turns_to_answer(roles(text))) for text in cases} == cases
    write_lines(tmp_path / "chat.jsonl", [{"conversations": roles("uat")}, {"conversations": roles("ua")}])
    report = regeneration(tmp_path, server).run()
    written = read_lines(tmp_path / "out.jsonl")
    assert written[0] == {"id": "chat-1", "conversations": roles("uat")} and written[1]["conversations"] != roles("ua")
    assert (report.unchanged, report.regenerated, len(server.requests)) == (1, 1, 1)


@pytest.mark.parametrize(
    "answer, reason",
    [
        (completion("cut", "length"), "reply longer than regenerate.max_new_tokens"),
        (completion(""), "empty reply"),
        ({"choices": None}, "malformed answer"),
        ((400, {"message": "the context of 9 tokens is too long"}), "refused by the server"),
        ((503, {"message": "busy"}), "no answer from the server"),
    ],
)
def test_a_conversation_without_usable_replies_is_left_out_named_and_asked_for_again(answer, reason, tmp_path, server):
    samples = conversations(20)
    write_lines(tmp_path / "chat.jsonl", samples)
    server.answer = lambda request: answer if asks_about(request, 4, 11) else completion(say(request))
    report = regeneration(tmp_path, server, data=DataSection(max_bad_share=0.1), attempts=1).run()
    assert report.left_out == {reason: 2} and report.missing == 2 and report.regenerated == 18
    assert {place for place, _, _ in report.named} == {f"{tmp_path / 'chat.jsonl'}:{number}" for number in (5, 12)}
    assert f"2 left out: 2 {reason}" in report.summary() and "The same command asks again for 2" in report.summary()
    assert read_lines(tmp_path / "out.jsonl") == expected_of(samples, left_out=(4, 11))
    server.requests.clear()
    server.answer = lambda request: completion(say(request))
    report = regeneration(tmp_path, server).run()
    assert all(asks_about(request, 4, 11) for request in server.requests)
    assert (report.by_earlier_runs, report.regenerated, report.num_left_out) == (18, 2, 0)
    assert read_lines(tmp_path / "out.jsonl") == expected_of(samples)
    assert not partial_of(tmp_path / "out.jsonl").exists()


def test_more_left_out_than_allowed_ends_without_an_output_and_loses_nothing(tmp_path, server):
    samples = conversations(20)
    write_lines(tmp_path / "chat.jsonl", samples)
    server.answer = lambda request: completion("") if asks_about(request, 4, 11) else completion(say(request))
    with pytest.raises(ValueError, match=r"10.0% .*data.max_bad_share allows 9.0%; the same command asks for the missing") as e:
        regeneration(tmp_path, server, data=DataSection(max_bad_share=0.09)).run()
    assert "2 left out: 2 empty reply" in str(e.value) and "chat.jsonl:5: empty reply" in str(e.value)
    assert not (tmp_path / "out.jsonl").exists()
    server.requests.clear()
    assert regeneration(tmp_path, server, data=DataSection(max_bad_share=0.1)).run().by_earlier_runs == 18
    assert all(asks_about(request, 4, 11) for request in server.requests)
    assert read_lines(tmp_path / "out.jsonl") == expected_of(samples, left_out=(4, 11))


def test_bad_lines_are_counted_and_named_and_too_many_end_it_before_any_request(tmp_path, server):
    samples = conversations(6)
    half = '{"conversations": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}'
    bad = ["{", '{"text": "x"}', half, "[" * 100_000]
    write_lines(tmp_path / "chat.jsonl", ["", *bad, *samples, "  "])
    with pytest.raises(ValueError, match="40.0% of the conversations are left out.*; fix or remove them") as error:
        regeneration(tmp_path, server, data=DataSection(max_bad_share=0.3)).run()
    assert "3 not JSON, 1 not a conversation" in str(error.value) and "chat.jsonl:2: not JSON" in str(error.value)
    assert not server.requests and [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]
    report = regeneration(tmp_path, server, data=DataSection(max_bad_share=0.4)).run()
    assert (report.num_conversations, report.regenerated, report.num_left_out, report.missing) == (10, 6, 4, 0)
    expected = [answered(sample, f"chat-{number}") for number, sample in enumerate(samples, start=6)]
    assert read_lines(tmp_path / "out.jsonl") == expected
    assert not partial_of(tmp_path / "out.jsonl").exists(), "no server can mend them"


def test_several_files_become_one_in_their_order(tmp_path, server):
    samples = conversations(9)
    parts = {"b": samples[:4], "a": samples[4:]}
    inputs = tuple(str(write_lines(tmp_path / f"{name}.jsonl", part)) for name, part in parts.items())
    regeneration(tmp_path, server, inputs=inputs).run()
    expected = [answered(s, f"{name}-{number}") for name, part in parts.items() for number, s in enumerate(part, start=1)]
    assert read_lines(tmp_path / "out.jsonl") == expected


def test_a_server_that_is_down_ends_it_before_any_request(tmp_path, server):
    write_lines(tmp_path / "chat.jsonl", conversations(3))
    with serving() as other:
        stop(other)
        with pytest.raises(ConfigError, match=f"{other.address}/models does not answer"):
            regeneration(tmp_path, server, other, attempts=1).run()
    assert not server.requests and [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


def die_after(server: ChatServer, count: int) -> None:
    """Refuse every connection once so many requests came; those that wait are cut off."""

    def fault_of(request: dict[str, Any]) -> None:
        if len(server.requests) > count and not server.closing.is_set():
            server.closing.set()
            server.socket.close()

    server.fault_of = fault_of


@pytest.mark.parametrize("others", [0, 1])
def test_a_server_that_dies_ends_it_with_what_is_done_and_the_rest_follows(others, tmp_path, server):
    samples = conversations(60)
    write_lines(tmp_path / "chat.jsonl", samples)
    server.delay_s = 0.02
    with serving() as dying:
        die_after(dying, 15)
        servers = [dying, server][: 1 + others]
        with pytest.raises(Unfinished, match=f"{dying.address} does not answer any more: .*; .* of 60 conv") as error:
            regeneration(tmp_path, *servers, attempts=1, timeout_s=10.0).run()
    done = len(read_lines(partial_of(tmp_path / "out.jsonl"))) - 1
    assert 0 < done < 60 and f"; {done} of 60 conversations are done, and the same command" in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()
    assert regeneration(tmp_path, server).run().by_earlier_runs == done
    assert read_lines(tmp_path / "out.jsonl") == expected_of(samples)


def test_some_without_answer_while_others_have_one_do_not_end_it(tmp_path, server):
    write_lines(tmp_path / "chat.jsonl", conversations(30))
    lost = [index for index in range(30) if index % 3]  # never more than two in a row
    server.fault_of = lambda request: "close before" if asks_about(request, *lost) else None
    report = regeneration(tmp_path, server, data=ANY_SHARE, attempts=1, concurrency=1).run()
    assert report.left_out == {"no answer from the server": 20} and report.regenerated == 10


def test_servers_are_used_alike_and_none_beyond_its_concurrency(tmp_path):
    write_lines(tmp_path / "chat.jsonl", conversations(60))
    with serving() as first, serving() as second:
        first.delay_s = second.delay_s = 0.03
        report = regeneration(tmp_path, first, second, concurrency=5).run()
        assert first.max_at_once == second.max_at_once == 5
        total = len(first.requests) + len(second.requests)
        assert report.num_replies == total and report.num_tokens == 3 * total
        assert min(len(first.requests), len(second.requests)) > 0.35 * total
        write_lines(tmp_path / "chat.jsonl", conversations(2))
        first.requests.clear(), second.requests.clear()
        regeneration(tmp_path, first, second, concurrency=5).run()
        assert first.requests and second.requests, "even where one could do it all"


def test_no_conversation_is_read_before_its_turn(tmp_path, server, monkeypatch):
    write_lines(tmp_path / "chat.jsonl", conversations(40))
    read = []
    missing = Regeneration._missing

    def counted(job: Regeneration):
        for line in missing(job):
            read.append(line)
            assert len(read) - len(job._journal) <= 3
            yield line

    monkeypatch.setattr(Regeneration, "_missing", counted)
    regeneration(tmp_path, server, concurrency=3).run()
    assert len(read) == 40


def test_other_options_or_inputs_do_not_continue_a_run(tmp_path, server):
    samples = conversations(20)
    chat = write_lines(tmp_path / "chat.jsonl", samples)
    server.answer = lambda request: completion("") if asks_about(request, 3) else completion(say(request))
    regeneration(tmp_path, server, data=ANY_SHARE).run()
    before = partial_of(tmp_path / "out.jsonl").read_bytes()
    num_requests = len(server.requests)
    for change, named in {
        "temperature": "regenerate.temperature: 0.0, now 0.5",
        "max_new_tokens": "regenerate.max_new_tokens: 4096, now 1",
    }.items():
        with pytest.raises(JournalError, match=f"{named}. Restore these, name another output, or delete"):
            regeneration(tmp_path, server, **{change: 1 if change == "max_new_tokens" else 0.5}).run()
    with pytest.raises(JournalError, match="data.template_kwargs: None, now {'x': 1}"):
        regeneration(tmp_path, server, data=DataSection(template_kwargs={"x": 1})).run()
    write_lines(chat, [*samples, samples[0]])
    with pytest.raises(JournalError, match="bytes of regenerate.inputs"):
        regeneration(tmp_path, server).run()
    write_lines(chat, samples)
    server.models = ["another"]
    with pytest.raises(JournalError, match="regenerate.model: 'tiny', now 'another'"):
        regeneration(tmp_path, server).run()
    assert partial_of(tmp_path / "out.jsonl").read_bytes() == before and len(server.requests) == num_requests
    moved = chat.rename(tmp_path / "moved.jsonl")
    server.models = ["tiny", "another"]
    server.answer = lambda request: completion(say(request))
    report = regeneration(tmp_path, server, inputs=(str(moved),), model="tiny", concurrency=1, timeout_s=9.0).run()
    assert report.by_earlier_runs == 19, "neither names of files nor what only speeds it up matter"


def test_a_conversation_whose_record_was_cut_off_is_asked_for_again(tmp_path, server):
    samples = conversations(20)
    write_lines(tmp_path / "chat.jsonl", samples)
    server.answer = lambda request: completion("") if asks_about(request, 3) else completion(say(request))
    regeneration(tmp_path, server, data=ANY_SHARE).run()
    partial = partial_of(tmp_path / "out.jsonl")
    lines = partial.read_bytes().splitlines(keepends=True)
    torn = json.loads(lines[-1])["line"]
    partial.write_bytes(b"".join(lines)[:-10])
    server.requests.clear()
    server.answer = lambda request: completion(say(request))
    assert regeneration(tmp_path, server).run().regenerated == 2
    assert all(asks_about(request, 3, torn) for request in server.requests)
    assert read_lines(tmp_path / "out.jsonl") == expected_of(samples)


def test_a_job_that_writes_the_same_output_is_refused(tmp_path, server):
    samples = conversations(6)
    write_lines(tmp_path / "chat.jsonl", samples)
    refused: list[str] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if not refused:
            refused.append("")
            with pytest.raises(JournalError, match="another process writes") as error:
                regeneration(tmp_path, server).run()
            refused[0] = str(error.value)
        return completion(say(request))

    server.answer = answer
    regeneration(tmp_path, server).run()
    assert "out.jsonl.partial" in refused[0]
    assert read_lines(tmp_path / "out.jsonl") == expected_of(samples)


def test_an_output_folder_is_made(tmp_path, server):
    write_lines(tmp_path / "chat.jsonl", conversations(2))
    job = regeneration(tmp_path, server)
    job.output = Path(tmp_path, "new", "folder", "out.jsonl")
    job.run()
    assert len(read_lines(job.output)) == 2
