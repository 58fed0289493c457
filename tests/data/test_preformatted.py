import numpy as np
import pytest

from engine.config.data_section import NAMED_TEMPLATES
from engine.data.chat import render, render_text
from engine.data.messages import BadSample
from engine.data.preformatted import Markers
from engine.data.templates import ChatTemplate
from tests.data.chat_formats import CONVERSATIONS, make_tokenizer, masked_text

WHOLE = sorted(set(NAMED_TEMPLATES) - {"qwen3", "gpt-oss"})  # those that write earlier turns as they were said


@pytest.mark.parametrize("name", WHOLE)
def test_text_gives_the_same_document_as_the_messages_it_was_written_from(name):
    tokenizer, (messages, extra) = make_tokenizer(name), CONVERSATIONS["several turns"]
    written = ChatTemplate(tokenizer, extra).text(messages)
    whole = render(messages, extra, tokenizer, None)
    document = render_text(written, Markers.of(tokenizer, None), tokenizer)
    shared = len(document)
    assert len(whole) - shared in (0, 1)  # messages also give the header that ends the last reply of GLM
    assert np.array_equal(document.input_ids, whole.input_ids[:shared])
    assert np.array_equal(document.assistant_mask, whole.assistant_mask[:shared])


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_replies_are_found_in_text(name):
    tokenizer, (messages, extra) = make_tokenizer(name), CONVERSATIONS["several turns"]
    document = render_text(ChatTemplate(tokenizer, extra).text(messages), Markers.of(tokenizer, None), tokenizer)
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    assert all(reply in text for reply, text in zip(replies, masked_text(document, tokenizer), strict=True))
    (last,) = masked_text(
        render_text(ChatTemplate(tokenizer, extra).text(messages), Markers.of(tokenizer, None), tokenizer, "last"), tokenizer
    )
    assert replies[-1] in last


WITH_TOOLS = ["glm-4", "glm-4.5", "gpt-oss", "kimi-k2", "llama3", "qwen2.5", "deepseek-v3", "mistral", "chatml"]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_what_tools_say_is_not_the_assistants(name):
    tokenizer, (messages, extra) = make_tokenizer(name), CONVERSATIONS["tools"]
    text = ChatTemplate(tokenizer, extra).text([*messages, {"role": "user", "content": "Thanks."}])
    replies = masked_text(render_text(text, Markers.of(tokenizer, None), tokenizer), tokenizer)
    assert len(replies) == 2 and "a café" in replies[0] and "It is here." in replies[1]
    assert not any("place" in reply or "Thanks." in reply for reply in replies)


def test_the_thinking_block_that_the_prompt_opens_is_the_prompts():
    tokenizer = make_tokenizer("deepseek-r1")
    text = "<｜User｜>q<｜Assistant｜><think>\nHm.\n</think>\n\nA.<｜end▁of▁sentence｜>"
    document = render_text(text, Markers.of(tokenizer, None), tokenizer)
    assert masked_text(document, tokenizer) == ["Hm.\n</think>\n\nA.<｜end▁of▁sentence｜>"]


def test_a_reply_whose_end_is_missing_runs_to_the_end(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    text = "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA list"
    assert masked_text(render_text(text, Markers.of(tokenizer, None), tokenizer), tokenizer) == ["A list"]


def test_text_without_a_reply_is_refused_by_name(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    with pytest.raises(BadSample, match=r"no reply header such as '<\|im_start\|>assistant\\n'"):
        render_text("A list is a sequence.", Markers.of(tokenizer, None), tokenizer)
    with pytest.raises(BadSample, match="no assistant turn"):
        render_text("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", Markers.of(tokenizer, None), tokenizer)


def test_a_template_whose_replies_cannot_be_told_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    with pytest.raises(ValueError, match="give messages under 'conversations'"):
        Markers.of(tokenizer, None)
