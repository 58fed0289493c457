"""Documents as segments, read back from the file that inspect_data.py writes."""

import json

import pytest

from engine.config.sections import DataSection
from engine.data.dataset import load_documents
from engine.data.documents import DocumentList
from engine.data.segments import write_segments
from engine.data.tokenised import tokenise
from tests.data.chat_formats import chat

FIRST = chat("What is a list?", "A café.")
SECOND = chat("q", "a", "r", "b")


def written(path, documents, tokenizer):
    write_segments(path, documents, tokenizer)
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("cached", [False, True])
def test_segments_are_the_text_and_whose_it_is(make_tokenizer, write_jsonl, tmp_path, cached):
    tokenizer = make_tokenizer("chatml")
    paths = [
        write_jsonl(FIRST | {"id": "one"}, b"", b"{", SECOND, name="1.jsonl"),
        write_jsonl(FIRST | {"id": 7}, name="2.jsonl"),
    ]
    section = DataSection(max_bad_share=0.5, cache_dir=str(tmp_path / "cache"))
    if cached:
        documents, _ = tokenise(paths, tokenizer, section, builds=True)
    else:
        documents, _ = load_documents(paths, tokenizer, section)
    found = written(tmp_path / "samples.json", documents, tokenizer)
    assert [entry["id"] for entry in found] == ["one", f"{paths[0]}:4", 7]
    assert [entry["place"] for entry in found] == [f"{paths[0]}:1", f"{paths[0]}:4", f"{paths[1]}:1"]
    assert found[0]["segments"] == [
        {"text": "<|im_start|>user\nWhat is a list?<|im_end|>\n<|im_start|>assistant\n", "assistant": False},
        {"text": "A café.<|im_end|>", "assistant": True},
        {"text": "\n", "assistant": False},
    ]
    said = [segment["text"] for segment in found[1]["segments"] if segment["assistant"]]
    assert said == ["a<|im_end|>", "b<|im_end|>"]


def test_each_document_of_a_conversation_has_its_id(make_tokenizer, write_jsonl, tmp_path):
    path = write_jsonl(SECOND | {"id": "two"})
    documents, _ = load_documents([path], make_tokenizer("chatml"), DataSection(turns="each"))
    found = written(tmp_path / "samples.json", documents, make_tokenizer("chatml"))
    assert [entry["id"] for entry in found] == ["two", "two"]


def test_documents_from_nowhere_are_numbered(make_document, make_tokenizer, tmp_path):
    documents = DocumentList([make_document(2, 3), make_document(1, 4)])
    found = written(tmp_path / "samples.json", documents, make_tokenizer("chatml"))
    assert [entry["id"] for entry in found] == ["document 0", "document 1"]
    assert written(tmp_path / "none.json", DocumentList([]), make_tokenizer("chatml")) == []
