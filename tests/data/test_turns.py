"""Replies are masked as a server generates them, whatever the template does with thinking and with earlier turns."""

import pytest

from engine.config.sections import DataSection
from engine.data.chat import render, render_turns
from engine.data.dataset import load_documents
from engine.data.messages import BadSample
from engine.data.templates import ChatTemplate
from engine.data.turns import CLOSED_BY_PROMPT, NOT_BEHIND_PROMPT, NOT_OPENED, NOT_WRITTEN
from tests.data.chat_formats import make_tokenizer, masked_text

ASKED = {"role": "user", "content": "2+2?"}
THINKS = {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}
THINKS_INLINE = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"}
CALL = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": {"query": "tea"}}}
CALLS = {"role": "assistant", "content": "", "reasoning_content": "Look.", "tool_calls": [CALL]}
# As GPT-OSS's: once an answer follows, the thought before a call is gone, which the prompt still held.
HARMONY = (
    "{% set ns = namespace(final=-1) %}"
    "{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.final = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "{% if m.reasoning_content and ns.final < loop.index0 %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
    "<|start|>assistant to={{ m.tool_calls[0].function.name }}<|channel|>commentary<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% elif m.role == 'assistant' %}"
    "{% if m.reasoning_content and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% elif m.role == 'tool' %}<|start|>{{ m.name }} to=assistant<|message|>{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# As Gemma 4's 31B: the prompt holds an empty thought that replies do not keep.
EMPTY_THOUGHT = (
    "{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n<|channel>thought\n<channel|>{% endif %}"
)
# As Cohere2's: two tokens end a reply, and the second one ends generation.
TWO_ENDS = (
    "{% for m in messages %}<|START|>{% if m.role == 'assistant' %}<|CHATBOT|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>"
    "{% else %}<|USER|>{{ m.content }}{% endif %}<|END_OF_TURN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START|><|CHATBOT|><|START_RESPONSE|>{% endif %}"
)


def tokenizer_with(template, special=(), eos=None):
    tokenizer = make_tokenizer("gpt-oss")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    if eos is not None:
        tokenizer.eos_token = eos
    return tokenizer


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("reply", [THINKS, THINKS_INLINE])
@pytest.mark.parametrize("name", ["qwen3", "glm-4.5"])
def test_thinking_is_left_out_where_the_prompt_closes_it(name, reply):
    tokenizer = make_tokenizer(name)
    off = {"enable_thinking": False}
    (document,) = render_turns([ASKED, reply], {}, tokenizer, off)
    prompt = ChatTemplate(tokenizer, off).text([ASKED], add_generation_prompt=True)
    end = {"qwen3": "4<|im_end|>", "glm-4.5": "\n4<|user|>"}[name]
    assert masked_text(document, tokenizer) == [end]
    assert decoded(tokenizer, document.input_ids).rstrip() == prompt + end
    assert document.changes == (CLOSED_BY_PROMPT,)


def test_with_thinking_off_later_turns_do_not_read_thoughts_that_were_never_generated():
    tokenizer = make_tokenizer("deepseek-v3")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜><think>"
        "{{ m.reasoning_content }}</think>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think></think>{% endif %}"
    )
    document = render([ASKED, THINKS, ASKED, THINKS], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["4<｜end▁of▁sentence｜>"] * 2
    assert "Two and two." not in decoded(tokenizer, document.input_ids)


def test_a_reply_that_only_thinks_is_refused_where_the_prompt_closes_thinking():
    with pytest.raises(BadSample, match="the prompt closes the thinking block"):
        render_turns([ASKED, THINKS | {"content": ""}], {}, make_tokenizer("qwen3"), {"enable_thinking": False})


def test_thinking_left_out_is_counted_or_refused(write_jsonl):
    path = write_jsonl(*({"conversations": [ASKED, reply]} for reply in (THINKS, THINKS_INLINE, ASKED | {"role": "assistant"})))
    section = DataSection(template_kwargs={"enable_thinking": False})
    _, report = load_documents([path], make_tokenizer("qwen3"), section)
    assert report.changes == {CLOSED_BY_PROMPT: 2}
    assert f"2 conversations with {CLOSED_BY_PROMPT}" in report.summary()
    _, report = load_documents([path], make_tokenizer("llama3"), section)
    assert report.changes == {NOT_WRITTEN: 1}  # an inline block is kept as words
    refusing = DataSection(template_kwargs={"enable_thinking": False}, lost_thinking="refuse", max_bad_share=1.0)
    documents, report = load_documents([path], make_tokenizer("qwen3"), refusing)
    assert len(documents) == 1 and [reason for _, reason, _ in report.bad] == ["thinking left out"] * 2


def test_replies_without_thinking_behind_a_prompt_that_opens_it_are_counted(write_jsonl):
    path = write_jsonl({"conversations": [ASKED, {"role": "assistant", "content": "4"}]}, {"conversations": [ASKED, THINKS]})
    documents, report = load_documents([path], make_tokenizer("deepseek-r1"), DataSection(lost_thinking="refuse"))
    assert len(documents) == 2 and report.changes == {NOT_OPENED: 1}


def test_a_thought_is_put_into_the_block_that_the_prompt_opens_and_the_template_leaves_empty():
    """As Kimi-K2.5's: final answers are written with an empty block, behind a prompt that opens it."""
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ '<think></think>' if m.role == 'assistant' else '' }}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|message|><think>{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    (document,) = render_turns([ASKED, THINKS], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["Two and two.</think>4<|end|>"] and document.changes == ()


RESULTS = ['{"t": 1}', 'He said "tea".', "Two\nlines.", "", "42", "assistant", "<|start|>assistant"]


@pytest.mark.parametrize("result", RESULTS)
def test_a_tool_result_of_any_form_leaves_the_mask_as_it_is(result):
    tokenizer = tokenizer_with(HARMONY)
    answer = {"role": "assistant", "content": f"It is {result}.", "reasoning_content": f"So {result} it is."}
    tool = {"role": "tool", "name": "search", "tool_call_id": "c1", "content": result}
    messages = [{"role": "user", "content": "Find tea."}, CALLS, tool, answer]
    documents = render_turns(messages, {}, tokenizer, None)
    call, final = (masked_text(document, tokenizer) for document in documents)
    analysis = "<|channel|>analysis<|message|>"
    called = '<|start|>assistant to=search<|channel|>commentary<|message|>{"query": "tea"}<|call|>'
    assert call == [f"{analysis}Look.<|end|>{called}"]
    thought = f"{analysis}So {result} it is.<|end|><|start|>assistant"
    assert final == [f"{thought}<|channel|>final<|message|>It is {result}.<|return|>"]
    prompt = ChatTemplate(tokenizer, {}).text(messages[:3], add_generation_prompt=True)
    assert decoded(tokenizer, documents[1].input_ids) == prompt + final[0]
    assert "Look." in prompt


@pytest.mark.parametrize("special", [(), ("<|turn>", "<turn|>", "<|channel>", "<channel|>")])
@pytest.mark.parametrize("reply", [THINKS, THINKS_INLINE, {"role": "assistant", "content": "4"}])
def test_an_empty_thought_of_any_spelling_stays_in_the_prompt(reply, special):
    tokenizer = tokenizer_with(EMPTY_THOUGHT, special)
    (document,) = render_turns([ASKED, reply], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["4<turn|>"]
    prompt = "<|turn>user\n2+2?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    assert decoded(tokenizer, document.input_ids).rstrip() == prompt + "4<turn|>"
    assert bool(document.changes) is (reply["content"] != "4" or "reasoning_content" in reply)


def test_a_header_is_no_empty_thought():
    tokenizer = tokenizer_with(EMPTY_THOUGHT.replace("<|channel>thought\n<channel|>", "<|start|>other<|end|>"))
    (document,) = render_turns([ASKED, {"role": "assistant", "content": "4"}], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["4<turn|>"]
    tokenizer.chat_template = EMPTY_THOUGHT.replace("<|channel>thought\n<channel|>", "Sure:")
    with pytest.raises(BadSample, match="after its generation prompt"):
        render_turns([ASKED, {"role": "assistant", "content": "4"}], {}, tokenizer, None)


@pytest.mark.parametrize("eos", [None, "<|END_OF_TURN|>"])
def test_a_reply_ends_with_the_token_that_ends_generation(eos):
    special = ["<|START|>", "<|CHATBOT|>", "<|USER|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|END_OF_TURN|>"]
    tokenizer = tokenizer_with(TWO_ENDS, special, eos)
    reply = {"role": "assistant", "content": "4"}
    document = render([ASKED, reply, ASKED, reply], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["4<|END_RESPONSE|><|END_OF_TURN|>"] * 2


def test_what_ends_a_conversation_is_not_the_replys():
    """As Phi-3's: an end of text stands behind the end token of the last turn only."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else '<|endoftext|>' }}"
    )
    tokenizer = tokenizer_with(template, ["<|user|>", "<|assistant|>"], "<|endoftext|>")
    document = render([ASKED, {"role": "assistant", "content": "4"}], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["4<|end|>"]


TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|start|>assistant<|message|>{{ m.content }}<|end|>\n"
    "{% endgeneration %}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)


def test_tags_that_hold_the_header_are_led_past_it():
    tokenizer = tokenizer_with(TAGGED)
    replies = [{"role": "assistant", "content": "4"}, {"role": "assistant", "content": "assistant"}]
    document = render([ASKED, replies[0], ASKED, replies[1]], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["4<|end|>", "assistant<|end|>"]


def test_tags_that_hold_a_header_that_cannot_be_told_are_refused():
    tokenizer = tokenizer_with(TAGGED.replace("if add_generation_prompt", "if false"))
    with pytest.raises(BadSample, match="mark more than replies"):
        render([ASKED, {"role": "assistant", "content": "4"}], {}, tokenizer, None)


def test_with_tags_and_thinking_off_the_thought_is_left_out():
    tokenizer = tokenizer_with(
        TAGGED.replace("{{ m.content }}", "<think>{{ m.reasoning_content }}</think>{{ m.content }}", 1).replace(
            "assistant<|message|>{% endif %}", "assistant<|message|><think></think>{% endif %}"
        )
    )
    document = render([ASKED, THINKS, ASKED, THINKS], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["4<|end|>"] * 2
    assert document.changes == (CLOSED_BY_PROMPT,) * 2


def test_with_tags_a_thought_that_the_history_drops_is_kept_in_its_own_turn():
    thought = "{% if loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    tokenizer = tokenizer_with(TAGGED.replace("{{ m.content }}", thought, 1))
    messages = [ASKED, THINKS, ASKED, THINKS]
    with pytest.raises(BadSample, match="differently once later turns follow"):
        render(messages, {}, tokenizer, None)
    documents = render_turns(messages, {}, tokenizer, None)
    assert [masked_text(document, tokenizer) for document in documents] == [["<think>Two and two.</think>4<|end|>"]] * 2


def test_a_call_ends_with_the_token_that_ends_generation():
    """As GPT-OSS's: the last turn ends otherwise than the history, here behind a token that closes the call."""
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.arguments | tojson }}<|channel|>{% endfor %}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
    )
    tokenizer = tokenizer_with(template, eos="<|return|>")
    (document,) = render_turns([ASKED, CALLS | {"content": "I search."}], {}, tokenizer, None)
    assert masked_text(document, tokenizer)[0].endswith("<|channel|><|return|>")


def test_a_call_without_a_header_of_its_own_is_the_assistants():
    """As Gemma 4's: behind a tool's result the model's turn goes on, without a generation prompt."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}<|result>{{ m.content }}<result|>{% else %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|turn>{{ m.role }}\n{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|call>{{ c.function.name }} {{ c.function.arguments | tojson }}<call|>{% endfor %}"
        "{{ '' if m.tool_calls else '<turn|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|turn>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_with(template, ["<|turn>", "<turn|>", "<|call>", "<call|>", "<|result>", "<result|>"])
    tool = {"role": "tool", "name": "search", "tool_call_id": "c1", "content": "Green"}
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    document = render([ASKED, calls, tool, calls, tool, {"role": "assistant", "content": "4"}], {}, tokenizer, None)
    call = '<|call>search {"query": "tea"}<call|>'
    assert masked_text(document, tokenizer) == [call, call, "4<turn|>"]


def test_tags_without_a_generation_prompt_do_not_hide_that_history_is_rewritten():
    """As Mistral's: the system message stands in the last question, so earlier ones are written otherwise."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}<|start|>{{ 'Be brief. ' if loop.revindex <= 2 else '' }}{{ m.content }}<|message|>{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_with(template)
    reply = {"role": "assistant", "content": "4"}
    with pytest.raises(BadSample, match="differently once later turns follow"):
        render([ASKED, reply, ASKED, reply], {}, tokenizer, None)
    assert masked_text(render([ASKED, reply], {}, tokenizer, None), tokenizer) == ["4<|end|>"]


# As Command-R7B's: the header and an empty thought are written even behind a reply.
ALWAYS_ASKED = (
    "{% for m in messages %}<|START|>{% if m.role == 'assistant' %}<|CHATBOT|>"
    "{% if m.tool_calls %}<|START_THINKING|><|END_THINKING|><|START_ACTION|>{{ m.tool_calls[0].function | tojson }}"
    "<|END_ACTION|>"
    "{% else %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}"
    "{% else %}<|USER|>{{ m.content }}{% endif %}<|END_OF_TURN|>{% endfor %}"
    "<|START|><|CHATBOT|><|START_THINKING|><|END_THINKING|>"
)


def test_a_header_that_is_written_even_behind_a_reply_is_the_prompt():
    names = ("START", "CHATBOT", "USER", "START_RESPONSE", "END_RESPONSE", "END_OF_TURN", "START_THINKING", "END_THINKING")
    special = [f"<|{name}|>" for name in (*names, "START_ACTION", "END_ACTION")]
    tokenizer = tokenizer_with(ALWAYS_ASKED, special, "<|END_OF_TURN|>")
    tool = {"role": "tool", "name": "search", "tool_call_id": "c1", "content": "Green"}
    messages = [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, tool, THINKS]
    call, answer = render_turns(messages, {}, tokenizer, None)
    called = '<|START_ACTION|>{"name": "search", "arguments": {"query": "tea"}}<|END_ACTION|><|END_OF_TURN|>'
    assert masked_text(call, tokenizer) == [called]
    assert masked_text(answer, tokenizer) == ["<|START_RESPONSE|>4<|END_RESPONSE|><|END_OF_TURN|>"]
    assert answer.changes == (CLOSED_BY_PROMPT,)
    prompt = ChatTemplate(tokenizer, {}).text(messages[:3], add_generation_prompt=True)
    assert decoded(tokenizer, answer.input_ids[~answer.assistant_mask]) == prompt


def test_a_llama_header_that_is_written_even_behind_a_reply_is_the_prompt():
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant<|message|>"
    )
    tokenizer = tokenizer_with(template)
    reply = {"role": "assistant", "content": "4"}
    assert masked_text(render([ASKED, reply, ASKED, reply], {}, tokenizer, None), tokenizer) == ["4<|end|>"] * 2


def test_an_empty_thought_of_the_prompt_stays_there_before_a_call():
    template = EMPTY_THOUGHT.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}<|call>{{ c.function | tojson }}<call|>{% endfor %}"
    )
    tokenizer = tokenizer_with(template, ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|call>", "<call|>"])
    (document,) = render_turns([ASKED, CALLS], {}, tokenizer, None)
    (masked,) = masked_text(document, tokenizer)
    assert masked.startswith("<|call>{") and masked.endswith("<call|><turn|>")
    assert document.changes == (CLOSED_BY_PROMPT,)


def test_a_reply_without_thinking_follows_the_header_of_its_prompt():
    """As Jamba-Reasoning's: the question is written otherwise once a reply without thinking follows it."""
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ 'Think. ' if loop.last and m.role == 'user' else '' }}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|message|><think>\n{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    (document,) = render_turns([ASKED, {"role": "assistant", "content": "4"}], {}, tokenizer, None)
    assert (
        decoded(tokenizer, document.input_ids)
        == "<|start|>user<|message|>Think. 2+2?<|end|><|start|>assistant<|message|>4<|end|>"
    )
    assert masked_text(document, tokenizer) == ["4<|end|>"] and document.changes == (NOT_OPENED,)


PROBE_PARTS = ("Zqa thought zqa.", "Zqb words zqb.", "zqc_function", "zqd", "Zqe value zqe", "Zqf message zqf")


@pytest.mark.parametrize("part", [*PROBE_PARTS, " ".join(PROBE_PARTS), "zqd zqd1 zqd2"])
def test_a_conversation_that_holds_the_words_of_the_probe_is_masked_as_any_other(part):
    tokenizer = make_tokenizer("deepseek-r1")
    replies = [{"role": "assistant", "content": text} for text in ("ok", f"Fine, {part} it is.")]
    question = {"role": "user", "content": f"What is {part} here?"}
    messages = [ASKED, replies[0], question, replies[1]]
    document = render(messages, {}, tokenizer, None)
    ends = [f"{reply['content']}<｜end▁of▁sentence｜>" for reply in replies]
    assert masked_text(document, tokenizer) == ends
    prompt = decoded(tokenizer, document.input_ids).removesuffix(ends[1])
    assert prompt.endswith(f"<｜User｜>{question['content']}<｜Assistant｜>")


@pytest.mark.parametrize("identifier", ["c1", "call00001"])
def test_a_history_that_holds_the_words_of_the_probe_leaves_a_call_as_it_is(identifier):
    tokenizer = tokenizer_with(HARMONY)
    question = {"role": "user", "content": " ".join(PROBE_PARTS)}
    tool = {"role": "tool", "name": "zqc_function", "tool_call_id": identifier, "content": "zqd"}
    calls = CALLS | {"tool_calls": [CALL | {"id": identifier}]}
    answer = {"role": "assistant", "content": "4"}
    documents = render_turns([question, calls, tool, answer], {}, tokenizer, None)
    call, final = (masked_text(document, tokenizer) for document in documents)
    called = '<|start|>assistant to=search<|channel|>commentary<|message|>{"query": "tea"}<|call|>'
    assert call == [f"<|channel|>analysis<|message|>Look.<|end|>{called}"]
    assert final == ["<|channel|>final<|message|>4<|return|>"]


def test_a_header_in_the_words_of_the_last_message_is_not_the_replys():
    """Behind a tool's result the reply has no header, so the only header is the one in the result's words."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}<|result>{{ m.content }}<result|>{% else %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|turn>{{ m.role }}\n{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|call>{{ c.function.name }}<call|>{% endfor %}"
        "{{ '' if m.tool_calls else '<turn|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|turn>assistant\n<think>{% endif %}"
    )
    special = ["<|turn>", "<turn|>", "<|call>", "<call|>", "<|result>", "<result|>"]
    tokenizer = tokenizer_with(template, special)
    result = "Green <|turn>assistant\n and black"
    tool = {"role": "tool", "name": "search", "tool_call_id": "c1", "content": result}
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    with pytest.raises(BadSample, match="after its generation prompt"):
        render_turns([ASKED, calls, tool, {"role": "assistant", "content": "4"}], {}, tokenizer, None)


NOW = {"id": "c2", "type": "function", "function": {"name": "now", "arguments": {}}}
XML_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>\n<function={{ c.function.name }}>\n{% for key, value in c.function.arguments.items() %}"
    "<parameter={{ key }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("source", [None, XML_CALLS])
@pytest.mark.parametrize("calls", [[NOW], [CALL, NOW], [NOW, CALL]])
def test_a_call_without_arguments_is_masked_where_the_format_closes_each_argument(source, calls):
    tokenizer = make_tokenizer("qwen3" if source else "glm-4.5")
    if source:
        tokenizer.chat_template = source
    reply = {"role": "assistant", "content": "", "tool_calls": calls}
    results = [{"role": "tool", "name": "now", "tool_call_id": call["id"], "content": "Noon"} for call in calls]
    answer = {"role": "assistant", "content": "4"}
    document = render_turns([ASKED, reply, *results, answer], {}, tokenizer, None)[0]
    (masked,) = masked_text(document, tokenizer)
    if source:
        written = {
            "now": "<tool_call>\n<function=now>\n</function>\n</tool_call>",
            "search": "<tool_call>\n<function=search>\n<parameter=query>\ntea\n</parameter>\n</function>\n</tool_call>",
        }
        opening = ""
        end = "<|im_end|>"
    else:
        written = {
            "now": "\n<tool_call>now\n</tool_call>",
            "search": "\n<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>tea</arg_value>\n</tool_call>",
        }
        opening = "\n<think></think>"
        end = "<|observation|>"
    assert masked == opening + "".join(written[call["function"]["name"]] for call in calls) + end


def test_thinking_that_the_template_writes_behind_another_header_is_not_said_to_be_closed_by_the_prompt():
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.reasoning_content %} thinks<|channel|>{{ m.reasoning_content }}"
        "{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    (document,) = render_turns([ASKED, THINKS], {}, tokenizer, None)
    assert masked_text(document, tokenizer) == ["4<|end|>"]
    assert document.changes == (NOT_BEHIND_PROMPT,)
