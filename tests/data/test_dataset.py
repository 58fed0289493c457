import numpy as np
import pytest

from engine.config.sections import DataSection
from engine.data.chat import render
from engine.data.dataset import Scan, fit, load_documents
from engine.data.documents import DocumentList
from engine.data.fingerprint import trained_with
from engine.data.templates import template_token_ids
from engine.data.tokenised import entry_name, tokenise
from engine.evaluation.acceptance import check_prompts, held_out_prompts
from tests.data.chat_formats import chat
from tests.data.conftest import TEMPLATES

GOOD = chat("What is a list?", "A mutable sequence.")
NO_ROLE = {"conversations": [{"role": "alien", "content": "q"}, {"role": "assistant", "content": "a"}]}


def test_documents_come_in_the_order_of_the_files(make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer("chatml")
    samples = [chat("a", "b"), chat("c", "d"), chat("e", "f")]
    paths = [write_jsonl(*samples[:2], name="1.jsonl"), write_jsonl(samples[2], b"", name="2.jsonl")]
    documents, report = load_documents(paths, tokenizer, DataSection())
    expected = [render(sample["conversations"], {}, tokenizer, None).input_ids.tolist() for sample in samples]
    assert [document.input_ids.tolist() for document in documents] == expected
    assert (report.num_samples, report.num_documents, report.bad) == (3, 3, ())
    assert report.num_tokens == sum(map(len, expected))
    assert report.num_assistant_tokens == sum(int(document.assistant_mask.sum()) for document in documents) > 0


def test_progress_ends_at_all_bytes(make_tokenizer, write_jsonl, tmp_path):
    seen = []
    paths = [write_jsonl(GOOD, GOOD, name="1.jsonl"), write_jsonl(GOOD, name="2.jsonl")]
    load_documents(paths, make_tokenizer("chatml"), DataSection(), on_progress=lambda *done: seen.append(done))
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert len(seen) == 2 and seen[-1] == (total, total) and seen == sorted(seen)


def test_bad_samples_are_counted_and_named(make_tokenizer, write_jsonl):
    path = write_jsonl(GOOD, b'{"conversations": [', NO_ROLE, b'{"\xff": 1}', NO_ROLE, GOOD)
    documents, report = load_documents([path], make_tokenizer("chatml"), DataSection(max_bad_share=0.9))
    assert len(documents) == 2 and report.num_samples == 6
    assert [(place, reason) for place, reason, _ in report.bad] == [
        (f"{path}:2", "not JSON"),
        (f"{path}:3", "unknown role"),
        (f"{path}:4", "not UTF-8"),
        (f"{path}:5", "unknown role"),
    ]
    assert "4 unusable" in report.summary()
    assert f"  2 unknown role, first: {path}:3: " in report.summary() and f"  1 not JSON: {path}:2: " in report.summary()


def test_summary_names_the_first_bad_sample_of_each_reason(make_tokenizer, write_jsonl):
    path = write_jsonl(GOOD, *[NO_ROLE] * 1234, b"{")
    _, report = load_documents([path], make_tokenizer("chatml"), DataSection(max_bad_share=1.0))
    assert f"  1,234 unknown role, first: {path}:2: " in report.summary() and f"{path}:3:" not in report.summary()
    assert f"  1 not JSON: {path}:1236: " in report.summary()


def test_too_many_bad_samples_stop_the_run(make_tokenizer, write_jsonl):
    path = write_jsonl(*[GOOD] * 3, NO_ROLE)
    load_documents([path], make_tokenizer("chatml"), DataSection(max_bad_share=0.25))
    with pytest.raises(ValueError, match=r"25\.0% .* data\.max_bad_share allows 24\.0%") as error:
        load_documents([path], make_tokenizer("chatml"), DataSection(max_bad_share=0.24))
    assert f"1 unknown role: {path}:4: " in str(error.value)


def test_unusable_files_are_named(make_tokenizer, write_jsonl):
    def message(path, tokenizer):
        with pytest.raises(ValueError) as error:
            load_documents([path], tokenizer, DataSection(max_bad_share=1.0))
        return str(error.value)

    tokenizer = make_tokenizer("chatml")
    assert "missing.jsonl: no such file" in message("missing.jsonl", tokenizer)
    assert "empty.jsonl: the file is empty" in message(write_jsonl(name="empty.jsonl"), tokenizer)
    only_bad = message(write_jsonl(NO_ROLE, name="bad.jsonl"), tokenizer)
    assert (
        "bad.jsonl: no conversation with an assistant token" in only_bad
        and "1 unknown role: " in only_bad
        and "bad.jsonl:1: " in only_bad
    )
    tokenizer.chat_template = None
    assert "no chat template" in message(write_jsonl(GOOD), tokenizer)


def test_a_document_is_cut_at_its_last_whole_turn(make_document):
    document = make_document(4, 6, 3, 5, 2, 9)
    (piece,) = fit(document, 20, "cut")
    assert len(piece) == 18 and piece.turn_ends == (10, 18)
    assert np.array_equal(piece.input_ids, document.input_ids[:18])
    assert np.array_equal(piece.assistant_mask, document.assistant_mask[:18])


def test_a_document_whose_first_turn_does_not_fit_is_cut_inside(make_document):
    (piece,) = fit(make_document(4, 30), 20, "cut")
    assert len(piece) == 20 and piece.turn_ends == ()


@pytest.mark.parametrize("policy", ["cut", "split"])
def test_a_document_that_fits_stays_whole(make_document, policy):
    document = make_document(4, 6, 10)
    (piece,) = fit(document, 20, policy)
    assert np.array_equal(piece.input_ids, document.input_ids) and piece.turn_ends == document.turn_ends


def test_split_pieces_start_at_turn_boundaries(make_document):
    pieces = list(fit(make_document(4, 6, 3, 5, 2, 9), 20, "split"))
    assert [len(piece) for piece in pieces] == [18, 11]
    assert [piece.turn_ends for piece in pieces] == [(10, 18), (11,)]


@pytest.mark.parametrize("max_tokens", [3, 7, 20, 31])
def test_split_pieces_make_up_the_document(make_document, max_tokens):
    document = make_document(4, 6, 3, 50, 2, 9, 1)
    pieces = list(fit(document, max_tokens, "split"))
    assert all(len(piece) <= max_tokens for piece in pieces)
    assert np.array_equal(np.concatenate([piece.input_ids for piece in pieces]), document.input_ids)
    assert np.array_equal(np.concatenate([piece.assistant_mask for piece in pieces]), document.assistant_mask)
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    ends = [start + end for start, piece in zip(starts, pieces, strict=False) for end in piece.turn_ends]
    assert tuple(ends) == document.turn_ends


def test_cut_split_and_dropped_documents_are_counted(make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer("chatml")
    path = write_jsonl(chat("q", "a " * 40, "q", "a " * 40), chat("q " * 99, "a"), GOOD)
    cut, report = load_documents([path], tokenizer, DataSection(max_tokens=64, long_documents="cut"))
    assert (report.cut, report.split, report.dropped) == (2, 0, 1)
    assert report.num_documents == len(cut) == 2
    assert "2 cut and 0 split at max_tokens, 1 dropped (no loss)" in report.summary()
    assert [place for place, _ in report.long] == [f"{path}:1", f"{path}:2"] and f"too long: {path}:1 (" in report.summary()
    pieces, report = load_documents([path], tokenizer, DataSection(max_tokens=64, long_documents="split"))
    assert (report.cut, report.split) == (0, 2)
    assert len(pieces) > len(cut)
    assert all(3 <= len(piece) <= 64 and piece.assistant_mask.any() for piece in pieces)


TWO_TURNS = chat("What is a list?", "A sequence.", "And a set?", "It has no order.")


@pytest.mark.parametrize(
    ("template", "turns", "by_turn", "num_documents"),
    [
        ("chatml", "auto", 0, 2),
        ("chatml", "each", 2, 3),
        ("qwen3", "auto", 1, 3),
        ("gpt-oss", "auto", 1, 3),
        ("gpt-oss", "each", 2, 3),
    ],
)
def test_conversations_are_taken_turn_by_turn_where_asked_or_needed(
    make_tokenizer, write_jsonl, template, turns, by_turn, num_documents
):
    path = write_jsonl(GOOD, TWO_TURNS)
    documents, report = load_documents([path], make_tokenizer(template), DataSection(turns=turns))
    assert (report.by_turn, report.num_documents, report.num_samples, report.bad) == (by_turn, num_documents, 2, ())
    assert all(len(document.turn_ends) == 1 for document in documents) is (num_documents == 3)
    assert (f"{by_turn} conversations rendered turn by turn" in report.summary()) is (by_turn > 0)


def test_whole_conversations_are_refused_where_the_template_rewrites_them(make_tokenizer, write_jsonl):
    section = DataSection(turns="whole", max_bad_share=0.5)
    _, report = load_documents([write_jsonl(GOOD, TWO_TURNS)], make_tokenizer("qwen3"), section)
    assert (report.by_turn, report.num_documents) == (0, 1)
    assert [reason for _, reason, _ in report.bad] == ["mask cannot be verified"]


def test_what_no_rendering_verifies_is_named_once(make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template += "{% if add_generation_prompt and messages | length > 1 %}?{% endif %}"
    documents, report = load_documents([write_jsonl(GOOD, TWO_TURNS)], tokenizer, DataSection(max_bad_share=0.5))
    assert (len(documents), report.by_turn) == (1, 0)
    assert [reason for _, reason, _ in report.bad] == ["mask cannot be verified"]


def test_a_conversation_that_the_template_refuses_is_not_taken_in_part(make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template += "{% if messages[-1].content == 'Hm?' %}{{ raise_exception('no such question') }}{% endif %}"
    path = write_jsonl(GOOD, chat("What is a list?", "A sequence.", "Hm?"))
    documents, report = load_documents([path], tokenizer, DataSection(max_bad_share=0.5))
    assert (len(documents), report.by_turn) == (1, 0)
    assert [reason for _, reason, _ in report.bad] == ["cannot be rendered"]


def test_a_reply_that_starts_beyond_max_tokens_is_dropped(make_tokenizer, write_jsonl):
    path = write_jsonl(chat("q", "a", "q " * 99, "a"))
    documents, report = load_documents([path], make_tokenizer("gpt-oss"), DataSection(max_tokens=64))
    assert (report.by_turn, report.cut, report.dropped) == (1, 1, 1)
    assert len(documents) == 1 and documents[0].turn_ends


def test_a_tokenizer_without_offsets_is_read_too(make_slow_tokenizer, write_jsonl):
    documents, report = load_documents([write_jsonl(GOOD, TWO_TURNS)], make_slow_tokenizer("llama3"), DataSection())
    assert (len(documents), report.by_turn, report.bad) == (2, 0, ())


def test_only_the_assistants_tokens_are_counted(make_document):
    documents = [make_document(2, 3), make_document(1, 4)]
    counts_V = DocumentList(documents).count_assistant_tokens(6)
    assert counts_V.tolist() == [0, 1, 2, 2, 2, 0]


def test_a_token_outside_the_vocabulary_is_refused(make_document):
    documents = [make_document(2, 3)]
    with pytest.raises(ValueError, match="document 0: token id 4 is outside the target's vocabulary of 4"):
        DocumentList(documents).count_assistant_tokens(4)


@pytest.mark.parametrize("cached", [False, True])
def test_a_token_outside_the_vocabulary_in_a_question_is_named_by_its_line(make_tokenizer, write_jsonl, tmp_path, cached):
    tokenizer = make_tokenizer("chatml")
    vocab_size = len(tokenizer)
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    path = write_jsonl(GOOD, chat("What is <extra> here?", "Nothing."))
    section = DataSection(cache_dir=str(tmp_path / "cache"))
    if cached:
        documents, _ = tokenise([path], tokenizer, section, builds=True)
    else:
        documents, _ = load_documents([path], tokenizer, section)
    with pytest.raises(ValueError, match=f"chats.jsonl:2: token id {vocab_size} is outside .* of {vocab_size}"):
        documents.count_assistant_tokens(vocab_size)
    documents.count_assistant_tokens(vocab_size + 1)
    prompts = held_out_prompts([path], tokenizer, 2, None)
    with pytest.raises(ValueError, match=f"held-out prompt .*chats.jsonl:2: token id {vocab_size} is outside"):
        check_prompts(prompts, vocab_size)
    check_prompts(prompts, vocab_size + 1)


def test_text_that_is_already_formatted_is_read_beside_messages(make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer("llama3")
    written = tokenizer.apply_chat_template(TWO_TURNS["conversations"], tokenize=False)
    path = write_jsonl({"text": written}, TWO_TURNS, {"text": "no reply"})
    (first, second), report = load_documents([path], tokenizer, DataSection(max_bad_share=0.4))
    assert np.array_equal(first.input_ids, second.input_ids) and np.array_equal(first.assistant_mask, second.assistant_mask)
    assert [(place, reason) for place, reason, _ in report.bad] == [(f"{path}:3", "no assistant turn")]


@pytest.mark.parametrize("turns", ["whole", "each"])
def test_only_the_last_turn_is_trained_on_where_asked(make_tokenizer, write_jsonl, turns):
    tokenizer = make_tokenizer("chatml")
    path = write_jsonl(TWO_TURNS)
    (document,), _ = load_documents([path], tokenizer, DataSection(turns=turns, train_on="last"))
    assert tokenizer.decode(document.input_ids[document.assistant_mask]) == "It has no order.<|im_end|>"


DEFAULT = TEMPLATES["chatml"]
TOOL_USE = "{% for tool in tools %}<|im_start|>{{ tool.function.name }}<|im_end|>\n{% endfor %}" + DEFAULT
SEARCH = {"type": "function", "function": {"name": "search", "description": "Searches.", "parameters": {"type": "object"}}}


def named_templates(make_tokenizer, **templates):
    """A tokenizer with several named chat templates, as Hermes and Command-R have."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = templates
    return tokenizer


def test_of_several_named_templates_conversations_with_tools_are_written_with_tool_use(make_tokenizer, write_jsonl):
    tokenizer = named_templates(make_tokenizer, default=DEFAULT, tool_use=TOOL_USE)
    text = tokenizer.apply_chat_template(GOOD["conversations"], tokenize=False)
    path = write_jsonl(GOOD, GOOD | {"tools": [SEARCH]}, {"text": text})
    documents, report = load_documents([path], tokenizer, DataSection())
    plain, with_tools, written = (tokenizer.decode(document.input_ids) for document in documents)
    assert report.bad == () and written == plain
    assert with_tools.startswith("<|im_start|>search<|im_end|>") and with_tools.endswith(plain)
    for document in documents:
        reply = tokenizer.decode(document.input_ids[document.assistant_mask])
        assert reply == "A mutable sequence.<|im_end|>"


def test_a_prompt_with_tools_is_written_with_tool_use_too(make_tokenizer, write_jsonl):
    tokenizer = named_templates(make_tokenizer, default=DEFAULT, tool_use=TOOL_USE)
    path = write_jsonl(GOOD, GOOD | {"tools": [SEARCH]})
    plain, with_tools = held_out_prompts([path], tokenizer, 2, None)
    assert tokenizer.decode(with_tools.token_ids) == "<|im_start|>search<|im_end|>\n" + tokenizer.decode(plain.token_ids)


def test_each_of_several_named_templates_counts_for_hashes_and_special_tokens(make_tokenizer, write_jsonl):
    section = DataSection()
    plain = named_templates(make_tokenizer, default=DEFAULT)
    other = named_templates(make_tokenizer, default=DEFAULT, tool_use=TOOL_USE + "<|return|>{{ strftime_now('%d') }}")
    assert trained_with(plain, section)["template_hash"] != trained_with(other, section)["template_hash"]
    scan = Scan.of([write_jsonl(GOOD)])
    assert entry_name(scan, plain, section) != entry_name(scan, other, section)
    more = set(template_token_ids(other)) - set(template_token_ids(plain))
    assert other.convert_tokens_to_ids("<|return|>") in more


def test_named_templates_without_a_default_are_refused_by_their_names(make_tokenizer, write_jsonl):
    tokenizer = named_templates(make_tokenizer, rag=DEFAULT, tool_use=TOOL_USE)
    with pytest.raises(ValueError, match=r"rag, tool_use.*data\.template"):
        load_documents([write_jsonl(GOOD)], tokenizer, DataSection())
