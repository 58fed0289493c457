"""What a line of a conversation file says, in each of the spellings that published sets have."""

import json

import pytest

from engine.data.messages import BadSample, read_messages

ASKED = {"role": "user", "content": "Time?"}
DONE = {"role": "assistant", "content": "Noon."}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {}}}


def calling(calls):
    return {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize("arguments", [{}, {"arguments": None}, {"arguments": "{}"}, {"arguments": {}}])
def test_a_call_without_arguments_gets_an_empty_object(arguments):
    call = CALL | {"function": {"name": "now", **arguments}}
    for spelling in ([call], json.dumps([call]), [call["function"]]):
        messages, _ = read_messages({"conversations": [ASKED, calling(spelling), DONE]})
        (read,) = messages[1]["tool_calls"]
        assert read.get("function", read) == {"name": "now", "arguments": {}}


@pytest.mark.parametrize("tools", [[SEARCH], json.dumps([SEARCH]), [json.dumps(SEARCH)]])
def test_tools_and_calls_may_be_json_text(tools):
    messages, extra = read_messages({"conversations": [ASKED, calling(json.dumps([CALL])), DONE], "tools": tools})
    assert extra == {"tools": [SEARCH]} and messages[1]["tool_calls"] == [CALL]


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_empty_tools_are_none(tools):
    assert read_messages({"conversations": [ASKED, DONE], "tools": tools})[1] == {}


@pytest.mark.parametrize("tools, reason", [("a hammer", "not JSON"), ("{}x", "not JSON"), ('"hammer"', "malformed tools")])
def test_tools_that_are_none_are_refused(tools, reason):
    with pytest.raises(BadSample) as error:
        read_messages({"conversations": [ASKED, DONE], "tools": tools})
    assert error.value.reason == reason


def test_reasoning_is_given_under_the_name_that_templates_read():
    messages, _ = read_messages({"conversations": [ASKED, DONE | {"reasoning": "Hm."}]})
    assert messages[1]["reasoning_content"] == "Hm."
    with pytest.raises(BadSample, match="turn 1 .*'reasoning' and 'reasoning_content'"):
        read_messages({"conversations": [ASKED, DONE | {"reasoning": "Hm.", "reasoning_content": "Ah."}]})
