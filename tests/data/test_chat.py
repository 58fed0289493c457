import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from engine.data.chat import render, render_turns
from engine.data.messages import BadSample, read_messages
from engine.data.templates import template_token_ids
from tests.data.chat_formats import masked_text

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A list is a mutable sequence.\n\nOf items."},
    {"role": "user", "content": "And a café? 🦊"},
    {"role": "assistant", "content": "A 🦊 in a café"},
]
END_TOKENS = {"tagged": "<|im_end|>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "no end token": "\n"}


def reason_of(call, *args):
    with pytest.raises(BadSample) as error:
        call(*args)
    return error.value.reason


@pytest.mark.parametrize("template", END_TOKENS)
def test_mask_covers_exactly_the_reply_and_its_end_token(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    document = render(CHAT, {}, tokenizer, None)
    replies = [message["content"] + END_TOKENS[template] for message in CHAT if message["role"] == "assistant"]
    assert masked_text(document, tokenizer) == replies
    assert document.input_ids.dtype == np.int32 and document.assistant_mask.dtype == bool
    assert len(document) == len(document.assistant_mask)


@pytest.mark.parametrize("template", END_TOKENS)
def test_rendered_tokens_are_those_of_the_chat_template(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    expected = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert render(CHAT, {}, tokenizer, None).input_ids.tolist() == expected


@pytest.mark.parametrize("template", END_TOKENS)
def test_turn_ends_lie_just_after_each_reply(make_tokenizer, template):
    document = render(CHAT, {}, make_tokenizer(template), None)
    mask = np.append(document.assistant_mask, False)
    assert document.turn_ends == tuple(np.flatnonzero(mask[:-1] & ~mask[1:]) + 1)
    assert len(document.turn_ends) == 2


@pytest.mark.parametrize(
    "replies",
    [("A list.",), ("a", "\n\nstarts and ends blank  "), ("🦊",), ("é" * 30, "user", "<|im_start|>")],
)
def test_tags_and_prefixes_give_the_same_mask(make_tokenizer, replies):
    messages = [{"role": "system", "content": "Be exact."}]
    for reply in replies:
        messages += [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": reply}]
    tagged, derived = (render(messages, {}, make_tokenizer(template), None) for template in ("tagged", "chatml"))
    assert np.array_equal(tagged.input_ids, derived.input_ids)
    assert np.array_equal(tagged.assistant_mask, derived.assistant_mask)
    assert tagged.turn_ends == derived.turn_ends


@pytest.mark.parametrize("template", ["tagged", "chatml"])
def test_a_closing_question_is_not_the_assistants(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    document = render([*CHAT, {"role": "user", "content": "Thanks."}], {}, tokenizer, None)
    assert len(masked_text(document, tokenizer)) == 2
    assert not document.assistant_mask[-5:].any()


def test_template_that_rewrites_history_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("forgets reasoning")
    thinking = [dict(message, reasoning_content="Hm.") if message["role"] == "assistant" else message for message in CHAT]
    assert reason_of(render, thinking, {}, tokenizer, None) == "mask cannot be verified"
    assert masked_text(render(thinking[:3], {}, tokenizer, None), tokenizer)[0].startswith("<think>Hm.</think>A list")
    assert len(masked_text(render(CHAT, {}, tokenizer, None), tokenizer)) == 2


SERVED = {
    "qwen3": ["<think>\n\n</think>\n\n{}<|im_end|>"] * 2,
    "gpt-oss": ["<|channel|>final<|message|>{}<|return|>"] * 2,
    "chatml": ["{}<|im_end|>"] * 2,
    "tagged": ["{}<|im_end|>"] * 2,
}


@pytest.mark.parametrize("template", ["qwen3", "gpt-oss"])
def test_several_turns_of_a_template_that_rewrites_them_are_no_one_document(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    assert reason_of(render, CHAT, {}, tokenizer, None) == "mask cannot be verified"
    assert masked_text(render(CHAT[:3], {}, tokenizer, None), tokenizer) == [SERVED[template][0].format(CHAT[2]["content"])]


@pytest.mark.parametrize("template", SERVED)
def test_turn_by_turn_each_reply_follows_the_prompt_it_is_served_after(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    documents = render_turns([*CHAT, {"role": "user", "content": "Thanks."}], {}, tokenizer, None)
    assert len(documents) == 2
    for document, index, reply in zip(documents, (2, 4), SERVED[template], strict=True):
        assert masked_text(document, tokenizer) == [reply.format(CHAT[index]["content"])]
        served = tokenizer.apply_chat_template(CHAT[:index], add_generation_prompt=True, return_dict=True)["input_ids"]
        first = int(document.assistant_mask.argmax())
        assert document.input_ids[:first].tolist() == served
        assert document.turn_ends == (first + int(document.assistant_mask.sum()),)


def test_turn_by_turn_a_conversation_of_one_reply_is_what_it_is_whole(make_tokenizer):
    for template in ("qwen3", "gpt-oss", "tagged", "llama3"):
        tokenizer = make_tokenizer(template)
        (document,), whole = render_turns(CHAT[:3], {}, tokenizer, None), render(CHAT[:3], {}, tokenizer, None)
        assert np.array_equal(document.input_ids, whole.input_ids)
        assert np.array_equal(document.assistant_mask, whole.assistant_mask) and document.turn_ends == whole.turn_ends


def test_reasoning_is_learned_in_its_turn_and_forgotten_after(make_tokenizer):
    tokenizer = make_tokenizer("qwen3")
    thinking = [CHAT[1], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA list."}, *CHAT[3:]]
    first, second = render_turns(thinking, {}, tokenizer, None)
    assert masked_text(first, tokenizer) == ["<think>\nHm.\n</think>\n\nA list.<|im_end|>"]
    assert "Hm." not in tokenizer.decode(second.input_ids) and "A list." in tokenizer.decode(second.input_ids)
    tokenizer = make_tokenizer("gpt-oss")
    thinking = [CHAT[1], CHAT[2] | {"thinking": "Hm."}]
    (document,) = render_turns(thinking, {}, tokenizer, None)
    assert masked_text(document, tokenizer)[0].startswith(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
    )


def test_what_the_prompt_already_says_is_not_the_assistants(make_tokenizer):
    tokenizer = make_tokenizer("qwen3")
    documents = render_turns(CHAT, {}, tokenizer, {"enable_thinking": False})
    replies = [message["content"] + "<|im_end|>" for message in CHAT if message["role"] == "assistant"]
    assert [masked_text(document, tokenizer)[0] for document in documents] == replies


@pytest.mark.parametrize("template", END_TOKENS)
def test_a_tokenizer_without_offsets_gives_the_same_mask(make_slow_tokenizer, template):
    tokenizer = make_slow_tokenizer(template)
    assert not tokenizer.is_fast
    document = render(CHAT, {}, tokenizer, None)
    assert document.input_ids.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert masked_text(document, tokenizer) == [m["content"] + END_TOKENS[template] for m in CHAT if m["role"] == "assistant"]
    assert document.turn_ends == tuple(end for turn in render_turns(CHAT, {}, tokenizer, None) for end in turn.turn_ends)


def test_without_offsets_a_token_across_a_turns_bound_is_refused(make_tokenizer, make_slow_tokenizer):
    messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "\nA list."}]
    with pytest.raises(BadSample, match="a token crosses the bound of a turn"):
        render(messages, {}, make_slow_tokenizer("chatml"), None)
    assert masked_text(render(messages, {}, make_tokenizer("chatml"), None), make_tokenizer("chatml")) == [
        "\nA list.<|im_end|>"
    ]


def test_header_without_generation_prompt_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("if add_generation_prompt", "if false")
    with pytest.raises(BadSample, match="no generation prompt"):
        render(CHAT, {}, tokenizer, None)


def test_reply_that_needs_no_generation_prompt_is_marked(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + '<|eot_id|>' }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    )
    replies = [f" {message['content']}<|eot_id|>" for message in CHAT if message["role"] == "assistant"]
    assert masked_text(render(CHAT, {}, tokenizer, None), tokenizer) == replies


def test_reply_that_does_not_follow_its_prompt_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template += "{% if add_generation_prompt %}?{% endif %}"
    assert reason_of(render, CHAT, {}, tokenizer, None) == "mask cannot be verified"


def test_what_a_template_raises_is_a_bad_sample(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{{ raise_exception('no system please') }}"
    with pytest.raises(BadSample, match="no system please"):
        render(CHAT, {}, tokenizer, None)
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    assert reason_of(render, CHAT, {}, tokenizer, None) == "cannot be rendered"
    lone_surrogate = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]
    for template in ("tagged", "chatml"):
        assert reason_of(render, lone_surrogate, {}, make_tokenizer(template), None) == "cannot be rendered"


def test_tools_and_template_arguments_reach_the_template(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{{ tools[0].name if tools else '' }}{{ tone }}" + tokenizer.chat_template
    messages, extra = read_messages({"conversations": CHAT, "tools": [{"name": "search"}]})
    document = render(messages, extra, tokenizer, {"tone": "calm"})
    assert tokenizer.decode(document.input_ids).startswith("searchcalm")


def test_sharegpt_reads_as_roles_and_content():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    messages, extra = read_messages({"id": "1", "conversations": turns})
    assert messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    assert extra == {}


def test_tool_calls_and_reasoning_pass_through():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "reasoning_content": "Hm."}
    result = {"role": "tool", "content": "", "tool_call_id": "1"}
    messages, extra = read_messages({"conversations": [call, result], "tools": [{"name": "f"}]})
    assert messages == [call | {"content": "", "tool_calls": [{"name": "f", "arguments": {}}]}, result]
    assert extra == {"tools": [{"name": "f"}]}


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "list"}]
    messages, _ = read_messages({"conversations": [{"role": "assistant", "content": parts}]})
    assert messages[0]["content"] == "a list"


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_media_parts_are_refused_by_name(kind):
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind}]
    with pytest.raises(BadSample, match=f"turn 0 holds a part of type '{kind}'") as error:
        read_messages({"conversations": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]})
    assert error.value.reason == "has images"


ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"conversations": [{"role": "user", "content": " \n"}, ANSWER]}, "empty turn"),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}, "empty turn"),
        ({"conversations": [{"role": "alien", "content": "q"}, ANSWER]}, "unknown role"),
        ({"conversations": [{"content": "q"}, ANSWER]}, "unknown role"),
        ({"conversations": [{"role": ["user"], "content": "q"}, ANSWER]}, "unknown role"),
        ({"conversations": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ({"conversations": []}, "no assistant turn"),
        ({"conversations": [ANSWER], "images": ["cat.png"]}, "has images"),
        ({"conversations": [ANSWER | {"image": "cat.png"}]}, "has images"),
        ({"conversations": [ANSWER | {"content": 7}]}, "content is not text"),
        ({"conversations": [ANSWER | {"content": "\ud800"}]}, "not UTF-8"),
        ({"conversations": [ANSWER | {"content": [{"type": "text"}]}]}, "content is not text"),
        ({"conversations": ["hello"]}, "not a conversation"),
        ({"text": "hello"}, "not a conversation"),
        (["hello"], "not a conversation"),
    ],
)
def test_unusable_samples_are_refused_by_category(sample, reason):
    assert reason_of(read_messages, sample) == reason


def test_special_tokens_of_the_template_are_those_that_it_writes():
    words = {"<unk>": 0, "<|user|>": 1, "<|end|>": 2, "<|reserved|>": 3, "hello": 4, "<eos>": 5}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.add_special_tokens(["<|user|>", "<|end|>", "<|reserved|>", "<eos>"])
    template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=template)
    assert template_token_ids(tokenizer) == [1, 2, 5]
