"""Published prompts are downloaded once, as rows of JSONL."""

import json
from pathlib import Path

import pytest

from engine.conversations import prompt_sets
from engine.conversations.prompt_sets import PROMPT_SETS, fetch_prompt_set, prompt_files, prompt_path


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_a_set_is_fetched_once(name, tmp_path, monkeypatch):
    asked = []

    def open_source(source: str):
        asked.append(source)
        return [("row 0", {"question": "é"}), ("row 1", {"question": "b", "level": 2})]

    monkeypatch.setattr(prompt_sets, "open_source", open_source)
    first = fetch_prompt_set(name, tmp_path / "cache")
    assert fetch_prompt_set(name, tmp_path / "cache") == first and asked == [PROMPT_SETS[name]]
    assert [json.loads(line) for line in first.read_text().splitlines()] == [{"question": "é"}, {"question": "b", "level": 2}]


def test_a_set_that_cannot_be_fetched_leaves_no_file(tmp_path, monkeypatch):
    def open_source(source: str):
        yield "row 0", {"question": "a"}
        raise ValueError(f"{source}: the hub cannot be reached")

    monkeypatch.setattr(prompt_sets, "open_source", open_source)
    with pytest.raises(ValueError, match="cannot be reached"):
        fetch_prompt_set("gsm8k", tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_named_sets_and_sets_of_the_hub_are_told_apart(tmp_path, monkeypatch):
    asked = []

    def open_source(source: str):
        asked.append(source)
        return [("row 0", {"question": "a"})]

    monkeypatch.setattr(prompt_sets, "open_source", open_source)
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own" / "prompts"
    own.parent.mkdir()
    own.write_text("{}\n")
    cache = tmp_path / "cache"
    names = ["own/prompts", "missing/chat.jsonl", "missing/prompts", "gsm8k", "openai/gsm8k:main:test"]
    files = prompt_files(names, cache)
    assert files[:3] == [Path(name) for name in names[:3]], "a file that is missing is named as it was written"
    assert files[3:] == [cache / "gsm8k.jsonl", cache / "openai+gsm8k+main+test.jsonl"]
    assert asked == ["openai/gsm8k:main:test"] * 2
    assert [prompt_path(name, cache) for name in names] == files
