"""Roles and arguments of tool calls as templates of different kinds accept them."""

import json

import pytest

from engine.config.sections import DataSection
from engine.data.dataset import load_documents
from engine.data.template_input import DEVELOPER_AS_SYSTEM, argument_form, takes_developer
from engine.data.templates import ChatTemplate
from engine.evaluation.acceptance import held_out_prompts
from tests.data.chat_formats import make_tokenizer as named_tokenizer
from tests.data.conftest import CHATML

ORDERED = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Time?"}]
SAMPLE = {"conversations": [*ORDERED, {"role": "assistant", "content": "Noon."}]}
NO_ARGUMENTS = {"id": "call00001", "type": "function", "function": {"name": "now"}}
TOOL_TALK = [
    {"role": "user", "content": "Time?"},
    {"role": "assistant", "content": "", "tool_calls": [NO_ARGUMENTS]},
    {"role": "tool", "name": "now", "tool_call_id": "call00001", "content": "Noon"},
    {"role": "assistant", "content": "Noon."},
]
FORM = {"deepseek-v3": "text"}
REFUSES_DEVELOPER = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if message.role == 'developer' %}{{ raise_exception('unknown role') }}{% endif %}",
)
DROPS_DEVELOPER = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'developer' %}"
)
TAKES_ANY_ROLE_FOR_THE_USER = CHATML.replace("<|im_start|>{{ message['role'] }}", "<|im_start|>user")


def with_template(make_tokenizer, source):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = source
    return tokenizer


@pytest.mark.parametrize("source", [REFUSES_DEVELOPER, DROPS_DEVELOPER, TAKES_ANY_ROLE_FOR_THE_USER])
def test_a_developer_becomes_the_system_where_the_template_has_none(make_tokenizer, write_jsonl, source):
    tokenizer = with_template(make_tokenizer, source)
    as_system = {"conversations": [ORDERED[0] | {"role": "system"}, *SAMPLE["conversations"][1:]]}
    path = write_jsonl(SAMPLE, SAMPLE)
    expected = write_jsonl(as_system, name="system.jsonl")
    documents, report = load_documents([path], tokenizer, DataSection())
    (system,), plain_report = load_documents([expected], tokenizer, DataSection())
    assert documents[0].input_ids.tolist() == system.input_ids.tolist()
    assert report.changes == {DEVELOPER_AS_SYSTEM: 2} and plain_report.changes == {}
    assert f"2 conversations with {DEVELOPER_AS_SYSTEM}" in report.summary()
    prompts = [held_out_prompts([file], tokenizer, 1, None)[0].token_ids for file in (path, expected)]
    assert prompts[0] == prompts[1]


def test_a_template_that_has_a_developer_gets_it(make_tokenizer, write_jsonl):
    tokenizer = with_template(make_tokenizer, CHATML)
    (document,), report = load_documents([write_jsonl(SAMPLE)], tokenizer, DataSection())
    assert tokenizer.decode(document.input_ids).startswith("<|im_start|>developer\nBe brief.")
    assert report.changes == {}


def test_the_forms_that_shipped_templates_take_are_found():
    for name in ("qwen3", "gpt-oss", "llama3", "kimi-k2", "glm-4.5", "mistral"):
        template = ChatTemplate(named_tokenizer(name), {})
        assert argument_form(template) == "object", name
    assert takes_developer(ChatTemplate(named_tokenizer("gpt-oss"), {}))


CALLS = "{{{{ message['content'] }}}}{{% for c in message.tool_calls or [] %}}{{{{ {} }}}}{{% endfor %}}<|im_end|>"


@pytest.mark.parametrize(
    "written, expected",
    [
        ("c.function.arguments | tojson", "{}"),
        ("c.function.arguments", "{}"),
        ("c.function.name + c.function.arguments", "now{}"),
    ],
)
def test_a_call_without_arguments_is_written_as_an_empty_object(make_tokenizer, write_jsonl, written, expected):
    calls = CALLS.format(written)
    tokenizer = with_template(make_tokenizer, CHATML.replace("{{ message['content'] }}<|im_end|>", calls))
    assert calls in tokenizer.chat_template
    path = write_jsonl({"conversations": [*TOOL_TALK[:1], TOOL_TALK[1] | {"content": "now"}, *TOOL_TALK[2:]]})
    (document,), _ = load_documents([path], tokenizer, DataSection())
    assert f"now{expected}<|im_end|>" in tokenizer.decode(document.input_ids)


def test_arguments_are_never_written_in_pythons_spelling(make_tokenizer, write_jsonl):
    calls = CALLS.format("c.function.name ~ c.function.arguments")
    tokenizer = with_template(make_tokenizer, CHATML.replace("{{ message['content'] }}<|im_end|>", calls))
    call = NO_ARGUMENTS | {"function": {"name": "now", "arguments": {"zone": "a café"}}}
    sample = {"conversations": [*TOOL_TALK[:1], TOOL_TALK[1] | {"tool_calls": [call]}, *TOOL_TALK[2:]]}
    (document,), _ = load_documents([write_jsonl(sample)], tokenizer, DataSection())
    assert 'now{"zone": "a café"}<|im_end|>' in tokenizer.decode(document.input_ids)


@pytest.mark.parametrize(
    "written", ["c.function.name ~ (c.function.arguments | tojson)", "c.function.name + c.function.arguments"]
)
def test_a_refused_tool_conversation_names_its_cause(make_tokenizer, write_jsonl, written):
    calls = CALLS.format(written)
    source = CHATML.replace("{{ message['content'] }}<|im_end|>", calls)
    stray = "{% if message.role == 'tool' and loop.previtem.role == 'user' %}{{ raise_exception('stray result') }}{% endif %}"
    tokenizer = with_template(
        make_tokenizer, source.replace("{% for message in messages %}", "{% for message in messages %}" + stray)
    )
    talk = [*TOOL_TALK, {"role": "user", "content": "x"}, TOOL_TALK[2], {"role": "assistant", "content": "y"}]
    _, report = load_documents(
        [write_jsonl({"conversations": TOOL_TALK}, {"conversations": talk})], tokenizer, DataSection(max_bad_share=0.5)
    )
    ((_, reason, detail),) = report.bad
    assert reason == "cannot be rendered" and "stray result" in detail


def test_tools_and_calls_as_json_text_train_as_objects_do(write_jsonl):
    tokenizer = named_tokenizer("qwen3")
    tools = [{"type": "function", "function": {"name": "now", "description": "Tells.", "parameters": {"type": "object"}}}]
    as_text = [TOOL_TALK[0], TOOL_TALK[1] | {"tool_calls": json.dumps([NO_ARGUMENTS])}, *TOOL_TALK[2:]]
    path = write_jsonl({"conversations": TOOL_TALK, "tools": tools}, {"conversations": as_text, "tools": json.dumps(tools)})
    documents, report = load_documents([path], tokenizer, DataSection())
    half = len(documents) // 2
    first = documents[:half]
    second = documents[half:]
    assert report.bad == () and half > 0
    assert [d.input_ids.tolist() for d in first] == [d.input_ids.tolist() for d in second]
