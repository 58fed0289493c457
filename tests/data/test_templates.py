from pathlib import Path

import pytest

from engine.config.data_section import NAMED_TEMPLATES
from engine.config.sections import DataSection, TargetSection
from engine.config.strict import ConfigError
from engine.data.chat import render, render_turns
from engine.data.dataset import load_documents
from engine.data.messages import BadSample, read_messages
from engine.data.templates import ChatTemplate, load_tokenizer, template_token_ids
from tests.data.chat_formats import (
    CALL,
    CONVERSATIONS,
    REFUSED,
    SPECIAL_TOKENS,
    TABLE,
    documents_of,
    make_tokenizer,
    masked_text,
    table,
)

CASES = [(name, kind) for name in NAMED_TEMPLATES for kind in CONVERSATIONS if (name, kind) not in REFUSED]
# what ends a reply, and a tool call where that is another
ENDS = {
    "chatml": "<|im_end|>",
    "deepseek-r1": "<｜end▁of▁sentence｜>",
    "deepseek-v3": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "glm-4": ("<|user|>", "<|observation|>"),
    "glm-4.5": ("<|user|>", "<|observation|>"),
    "gpt-oss": ("<|return|>", "<|call|>"),
    "kimi-k2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama4": "<|eot|>",
    "mistral": "</s>",
    "phi-3": "<|end|>",
    "phi-4": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
}
KEEP_REASONING = {"deepseek-r1", "glm-4.5", "gpt-oss", "qwen3"}


def test_every_named_template_says_where_its_format_is_published():
    assert set(NAMED_TEMPLATES) == set(SPECIAL_TOKENS) == set(ENDS)
    for path in NAMED_TEMPLATES.values():
        assert "Source: " in path.read_text(encoding="utf-8").partition("-#}")[0]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_mask_is_each_reply_with_its_end_token_and_nothing_behind(name, kind):
    tokenizer, documents = documents_of(name, kind)
    replies = [message for message in CONVERSATIONS[kind][0] if message["role"] == "assistant"]
    masked = [text for document in documents for text in masked_text(document, tokenizer)]
    assert len(masked) == len(replies)
    ends = ENDS[name] if isinstance(ENDS[name], tuple) else (ENDS[name], ENDS[name])
    for reply, text in zip(replies, masked, strict=True):
        calls = reply.get("tool_calls")
        assert text.endswith(ends[1] if calls else reply["content"] + ends[0])
        assert not calls or ("search" in text and "a café" in text)
        assert ("Two and two." in text or "Three and three." in text) is (kind == "thinking" and name in KEEP_REASONING)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_precedes_a_reply_is_what_a_server_reads_there(name, kind):
    tokenizer, documents = documents_of(name, kind)
    messages, extra = CONVERSATIONS[kind]
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    documents = documents if len(documents) == len(replies) else documents * len(replies)
    for number, (index, document) in enumerate(zip(replies, documents, strict=True)):
        served = ChatTemplate(tokenizer, extra).text(messages[:index], add_generation_prompt=True)
        first = [f for f, masked in enumerate(document.assistant_mask) if masked and not document.assistant_mask[f - 1]]
        before = tokenizer.decode(
            document.input_ids[: first[number if len(first) > 1 else 0]], clean_up_tokenization_spaces=False
        )
        opened = (
            "<think>\n" if name == "deepseek-r1" and kind == "several turns" else ""
        )  # replies without reasoning have no block
        assert before + opened == served


@pytest.mark.parametrize(("name", "kind"), sorted(REFUSED))
def test_what_a_format_has_no_words_for_is_refused(name, kind):
    with pytest.raises(BadSample):
        documents_of(name, kind)


@pytest.mark.parametrize("name", ["qwen3", "glm-4.5"])
def test_with_thinking_off_the_prompt_holds_the_empty_block(name):
    tokenizer, (messages, extra) = make_tokenizer(name), CONVERSATIONS["several turns"]
    documents = render_turns(messages, extra, tokenizer, {"enable_thinking": False})
    assert [masked_text(document, tokenizer)[0].strip() for document in documents] == [
        message["content"] + (ENDS[name] if name == "qwen3" else ENDS[name][0])
        for message in messages
        if message["role"] == "assistant"
    ]


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_trained_on_the_last_turn_only_that_is_marked(name):
    tokenizer, (messages, extra) = make_tokenizer(name), CONVERSATIONS["several turns"]
    (by_turn,) = render_turns(messages, extra, tokenizer, None, "last")
    everything = [text for document in documents_of(name, "several turns")[1] for text in masked_text(document, tokenizer)]
    assert masked_text(by_turn, tokenizer) == everything[-1:]
    assert masked_text(render(messages, extra, tokenizer, None, "last"), tokenizer) == everything[-1:]


def test_the_published_table_is_what_the_masks_are():
    assert TABLE.read_text(encoding="utf-8") == "\n".join(table()) + "\n"


def test_tags_that_do_not_hold_the_reply_are_refused(make_tokenizer):
    tokenizer = make_tokenizer("tagged")
    whole = tokenizer.chat_template
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A list."}]
    tokenizer.chat_template = whole.replace(
        "{% generation %}{{ message['content'] }}", "{{ message['content'] }}{% generation %}"
    )
    with pytest.raises(BadSample, match="mark more than replies|does not hold all of it"):
        render(messages, {}, tokenizer, None)
    tokenizer.chat_template = whole.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endif %}"
    )
    with pytest.raises(BadSample, match="marks 1 replies of 2"):
        render(messages * 2, {}, tokenizer, None)


@pytest.mark.parametrize(
    "spoiled", ["{{ message['content'] | upper }}", "{{ message['content'] }} Yours.", "{{ message['content'][:3] }}"]
)
def test_a_template_that_alters_a_reply_is_refused(make_tokenizer, spoiled):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ message['content'] }}", spoiled)
    with pytest.raises(BadSample) as error:
        render([{"role": "user", "content": "q"}, {"role": "assistant", "content": "A list."}], {}, tokenizer, None)
    assert error.value.reason == "mask cannot be verified"


ASKED = {"role": "user", "content": "Where?"}


def masked(name, *messages, tools=True, kwargs=None):
    """What each document of a conversation marks."""
    tokenizer = make_tokenizer(name)
    extra = {"tools": CONVERSATIONS["tools"][1]["tools"]} if tools else {}
    messages, _ = read_messages({"conversations": [ASKED, *messages]})
    return [text for document in render_turns(messages, extra, tokenizer, kwargs) for text in masked_text(document, tokenizer)]


@pytest.mark.parametrize("name", ["glm-4", "glm-4.5", "llama4", "kimi-k2", "qwen2.5", "qwen3", "deepseek-v3", "mistral"])
def test_words_before_a_call_are_the_replys_and_so_is_its_end(name):
    (text,) = masked(name, {"role": "assistant", "content": "I search.", "tool_calls": [CALL]})
    assert "I search." in text and "a café" in text
    assert text.endswith(ENDS[name] if isinstance(ENDS[name], str) else ENDS[name][1])


@pytest.mark.parametrize("name", ["qwen3", "glm-4.5", "gpt-oss", "deepseek-r1"])
def test_a_reply_that_only_thinks_ends_with_its_end_token(name):
    (text,) = masked(name, {"role": "assistant", "content": "", "reasoning_content": "Hm."}, tools=False)
    assert "Hm." in text and text.endswith(ENDS[name] if isinstance(ENDS[name], str) else ENDS[name][0])
    assert text.count("<|user|>") == (name == "glm-4.5")


@pytest.mark.parametrize("name", ["chatml", "llama3", "kimi-k2", "gemma", "glm-4", "mistral"])
def test_a_reply_of_which_the_template_writes_nothing_is_refused(name):
    with pytest.raises(BadSample, match="leaves out words"):
        masked(name, {"role": "assistant", "content": "", "reasoning_content": "Hm."}, tools=False)


@pytest.mark.parametrize("name", ["qwen3", "glm-4.5"])
def test_a_tag_among_the_words_is_a_word(name):
    words = "Close it with the </think> tag."
    (text,) = masked(name, {"role": "assistant", "content": words, "reasoning_content": "Hm."}, tools=False)
    assert words in text
    with pytest.raises(BadSample):
        masked(name, {"role": "assistant", "content": "The tag </think> closes <think>."}, tools=False)


@pytest.mark.parametrize("name", ["llama3", "llama4", "chatml", "glm-4.5", "qwen3"])
def test_arguments_that_are_json_text_are_written_as_objects_are(name):
    as_text = CALL | {"function": CALL["function"] | {"arguments": '{"query": "a café"}'}}
    first, second = (masked(name, {"role": "assistant", "content": "", "tool_calls": [call]}) for call in (CALL, as_text))
    assert first == second


def test_arguments_are_written_as_text_where_the_template_wants_them_so(write_jsonl):
    tokenizer = chatml(tags=False)
    calls = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.name + c.arguments }}{% endfor %}<|im_end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}<|im_end|>", calls, 1)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    (document,), _ = load_documents([write_jsonl({"conversations": [ASKED, call]})], tokenizer, DataSection())
    assert masked_text(document, tokenizer) == ['f{"x": 1}<|im_end|>']


def test_a_closed_thinking_block_of_the_template_is_not_closed_twice():
    """As DeepSeek V3.1's: replies of the history open with a closing tag, the thinking prompt with an opening one."""
    tokenizer = make_tokenizer("deepseek-v3")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜></think>"
        "{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>{% endif %}"
    )
    reply = {"role": "assistant", "content": "A list.", "reasoning_content": "Hm."}
    (document,) = render_turns([ASKED, reply], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["Hm.</think>A list.<｜end▁of▁sentence｜>"]


def test_a_reply_is_found_where_the_template_rewrites_what_stands_before_it():
    """As GPT-OSS's own: once an answer is there, the reasoning before the call is gone, which the prompt still held."""
    tokenizer = make_tokenizer("gpt-oss")
    kept = "(message.tool_calls or loop.last)"
    tokenizer.chat_template = tokenizer.chat_template.replace(kept, "(loop.last or add_generation_prompt)")
    messages = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "I search."},
        {"role": "tool", "content": "here", "name": "search"},
        {"role": "assistant", "content": "Here.", "reasoning_content": "Found."},
    ]
    (last,) = render_turns(messages, {}, tokenizer, None, "last")
    served = ChatTemplate(tokenizer, {}).text(messages[:3], add_generation_prompt=True)
    assert "I search." in served
    assert tokenizer.decode(last.input_ids[~last.assistant_mask], clean_up_tokenization_spaces=False) == served
    assert (
        masked_text(last, tokenizer)[0].endswith("<|channel|>final<|message|>Here.<|return|>")
        and "Found." in masked_text(last, tokenizer)[0]
    )


@pytest.mark.parametrize("tags", [True, False])
def test_what_opens_a_conversation_is_read_not_learned(tags):
    tokenizer = chatml(tags)
    greeting = {"role": "assistant", "content": "Hello."}
    document = render([greeting, ASKED, {"role": "assistant", "content": "Here."}], {}, tokenizer, None)
    assert "Hello." in tokenizer.decode(document.input_ids) and masked_text(document, tokenizer) == ["Here.<|im_end|>"]
    with pytest.raises(BadSample, match="no assistant turn follows a user"):
        render([greeting, ASKED], {}, tokenizer, None)


def chatml(tags, end="<|im_end|>", inside=True):
    """A ChatML tokenizer with or without tags, which may leave out the end token."""
    tokenizer = make_tokenizer("chatml")
    reply = f"{{{{ m.content }}}}{end}"
    if tags:
        reply = (
            f"{{% generation %}}{{{{ m.content }}}}{end}{{% endgeneration %}}"
            if inside
            else (f"{{% generation %}}{{{{ m.content }}}}{{% endgeneration %}}{end}")
        )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + reply + "{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def test_an_end_token_that_is_not_marked_special_is_found():
    tokenizer = chatml(tags=False, end="</s>")
    tokenizer.eos_token = "</s>"
    document = render([ASKED, {"role": "assistant", "content": "Here."}], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["Here.</s>"]


def test_tags_that_leave_out_the_end_token_are_led_over_it():
    tokenizer = chatml(tags=True, inside=False)
    document = render([ASKED, {"role": "assistant", "content": "Here."}], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["Here.<|im_end|>"]


@pytest.mark.parametrize("calls", ["search", ["search"], [{"function": None}], [{"function": {"name": None}}], [{}]])
def test_a_malformed_call_is_refused_by_name(calls):
    with pytest.raises(BadSample) as error:
        read_messages({"conversations": [ASKED, {"role": "assistant", "content": "x", "tool_calls": calls}]})
    assert error.value.reason == "malformed tool call"


def test_arguments_that_whoever_renders_gives_are_refused():
    with pytest.raises(ConfigError, match="add_generation_prompt"):
        DataSection(template_kwargs={"add_generation_prompt": True})


def test_a_template_is_chosen_by_name_or_file(tmp_path):
    section = TargetSection(path=str(Path(__file__).resolve().parents[2] / "launcher" / "embedded" / "target"))
    own = load_tokenizer(section, DataSection()).chat_template
    (tmp_path / "mine.jinja").write_text(own + "{# mine #}", encoding="utf-8")
    assert load_tokenizer(section, DataSection(template=str(tmp_path / "mine.jinja"))).chat_template == own + "{# mine #}"
    assert load_tokenizer(section, DataSection(template="llama3")).chat_template == NAMED_TEMPLATES["llama3"].read_text(
        encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="did you mean 'qwen3'"):
        DataSection(template="qwen33")


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_what_ends_a_reply_is_among_the_templates_special_tokens(name):
    tokenizer = make_tokenizer(name)
    ends = {tokenizer.convert_tokens_to_ids(end) for end in ([ENDS[name]] if isinstance(ENDS[name], str) else ENDS[name])}
    assert ends <= set(template_token_ids(tokenizer))
