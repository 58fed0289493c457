"""A chat template that would run for ever, or fill the memory, is refused; all others render as before."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from engine.config.data_section import NAMED_TEMPLATES
from engine.config.sections import DataSection
from engine.data import dataset, template_limits
from engine.data.dataset import load_documents
from engine.data.messages import BadSample
from engine.data.template_limits import bound_chat_templates, exceeds_limits
from engine.data.templates import ChatTemplate
from engine.data.tokenised import tokenise
from tests.data.chat_formats import CONVERSATIONS, REFUSED, chat, make_tokenizer

ASKED = [{"role": "user", "content": "w1"}]
LONG = "{% for i in range(90000) %}"
GROW = "{% set n = namespace(s='xy', l=[1], i=3) %}{% for i in range(90) %}"
ENDLESS = {
    "a range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": LONG + LONG + "x{% endfor %}{% endfor %}",
    "nested loops without output": LONG + LONG + "{% endfor %}{% endfor %}",
    "a loop in a set block": "{% set s %}" + LONG + LONG + "x{% endfor %}{% endfor %}{% endset %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros as a tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a block that writes itself": "{% block b %}{{ self.b() }}{% endblock %}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "a multiplied text": "{{ 'x' * 10**9 }}",
    "a multiplied list": "{{ ([1] * 10**9)|length }}",
    "a power": "{{ 10**99999999 }}",
    "doubled by ~": GROW + "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubled by +": GROW + "{% set n.s = n.s + n.s %}{% endfor %}",
    "a doubled list": GROW + "{% set n.l = n.l + n.l %}{% endfor %}",
    "doubled by a format": GROW + "{% set n.s = '%s%s' % (n.s, n.s) %}{% endfor %}",
    "a squared number": GROW + "{% set n.i = n.i * n.i %}{% endfor %}",
    "a wide format": "{{ '%999999999d' % 5 }}",
    "a wide format by value": "{{ '%*d' % (10**9, 5) }}",
    "a long output": LONG + "x" * 999 + "{% endfor %}",
}


@pytest.fixture
def small_limits(monkeypatch):
    """Limits that are reached soon."""
    monkeypatch.setattr(template_limits, "MAX_ROUNDS", 200_000)
    monkeypatch.setattr(template_limits, "MAX_SIZE", 1 << 20)


def with_template(source: str, name: str = "chatml"):
    tokenizer = make_tokenizer(name)
    tokenizer.chat_template = source
    return tokenizer


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_end_is_refused(kind, small_limits):
    template = ChatTemplate(with_template(ENDLESS[kind]), {})
    for render in (template.text, template.tagged):
        with pytest.raises(BadSample, match="cannot be rendered") as caught:
            render(ASKED)
        assert exceeds_limits(caught.value)


def test_the_time_of_a_rendering_is_limited(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.02)
    source = "\n{% for i in range(90000) %}{% set x = 'word ' * 9999 %}{% endfor %}"
    with pytest.raises(BadSample, match=r"more than 0\.02 s, the last in line 2 of the template; correct"):
        ChatTemplate(with_template(source), {}).text(ASKED)


def test_limits_count_each_rendering_alone_in_every_thread(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_ROUNDS", 1000)
    template = ChatTemplate(with_template("{% for i in range(900) %}x{% endfor %}"), {})
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: template.text(ASKED), range(40)))
    assert texts == ["x" * 900] * 40


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_templates_render_as_in_transformers_own_sandbox(name, monkeypatch):
    tokenizer = make_tokenizer(name)
    chats = [messages for kind, (messages, *_) in CONVERSATIONS.items() if (name, kind) not in REFUSED]

    def rendered() -> list[str]:
        return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in chats]

    ours = rendered()
    assert chat_template_utils.ImmutableSandboxedEnvironment is template_limits.BoundedEnvironment
    try:
        chat_template_utils.ImmutableSandboxedEnvironment = ImmutableSandboxedEnvironment
        chat_template_utils._compile_jinja_template.cache_clear()
        theirs = rendered()
    finally:
        bound_chat_templates()
    assert ours == theirs


def test_operators_give_what_they_give_in_jinja():
    expected = {
        "'20240101 **%d%%' % 99999999": "20240101 **99999999%",
        "'a' ~ 1 ~ none": "a1None",
        "2 + 3 * 4": "14",
        "[1] + [2]": "[1, 2]",
        "'ab' * 3": "ababab",
        "2 ** 10": "1024",
        "7 % 4": "3",
        "'%05.1f' % 2": "002.0",
    }
    source = "|".join(f"{{{{ {expression} }}}}" for expression in expected)
    assert ChatTemplate(with_template(source), {}).text(ASKED).split("|") == list(expected.values())


def endless_for(word: str) -> str:
    """A template that never ends for conversations with a word."""
    usual = NAMED_TEMPLATES["chatml"].read_text()
    return f"{{% if {word!r} in messages[0].content %}}{LONG}{LONG}{{% endfor %}}{{% endfor %}}{{% endif %}}{usual}"


@pytest.mark.parametrize("workers", [None, 2])
def test_a_conversation_without_end_is_named_like_others_that_cannot_be_rendered(small_limits, write_jsonl, tmp_path, workers):
    tokenizer = with_template(endless_for("w7"))
    path = write_jsonl(chat("w1", "w2"), chat("w7", "w2"), chat("w3", "w4"))
    (tmp_path / "mine.jinja").write_text(tokenizer.chat_template)
    section = DataSection(max_bad_share=0.5, template=str(tmp_path / "mine.jinja"), cache_dir=str(tmp_path / "cache"))
    if workers is None:
        documents, report = load_documents([path], tokenizer, section)
    else:  # in other processes, with the usual limits
        documents, report = tokenise([path], tokenizer, replace(section, workers=workers), builds=True)
    assert len(documents) == 2
    ((place, reason, detail),) = report.bad
    assert (place, reason) == (f"{path}:2", "cannot be rendered")
    assert detail.startswith(f"data.template={tmp_path / 'mine.jinja'}: TemplateLimitError: rendering took more than")


def test_a_template_that_never_ends_ends_the_run_with_one_message(small_limits, write_jsonl, monkeypatch):
    path = write_jsonl(*(chat("w7", "w2") for _ in range(30)))
    with pytest.raises(ValueError, match=r"^the chat template of .* cannot render even a short conversation: .*line 1 of"):
        load_documents([path], with_template(ENDLESS["nested loops"]), DataSection())
    monkeypatch.setattr(dataset, "MAX_EXCEEDED", 3)
    with pytest.raises(ValueError, match=r"chats\.jsonl:3: .*for 3 conversations in a row"):
        load_documents([path], with_template(endless_for("w7")), DataSection(max_bad_share=1.0))
    with open(path, "w") as file:
        file.writelines(json.dumps(chat(word, "w2")) + "\n" for word in ["w7", "w7", "w1"] * 4)
    documents, report = load_documents([path], with_template(endless_for("w7")), DataSection(max_bad_share=1.0))
    assert len(documents) == 4 and len(report.bad) == 8
