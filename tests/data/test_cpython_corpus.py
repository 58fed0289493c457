import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from engine.data.cpython_corpus import write_corpus
from engine.data.messages import read_messages


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, Path]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def sides(corpus) -> list[list[dict]]:
    return [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in corpus]


def test_another_process_writes_the_same_bytes(corpus, tmp_path):
    script = "import sys, pathlib; from engine.data.cpython_corpus import write_corpus; write_corpus(pathlib.Path(sys.argv[1]))"
    root = str(Path(engine.__file__).parents[1])
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)
    assert [path.read_bytes() for path in corpus] == [(tmp_path / path.name).read_bytes() for path in corpus]


def opening_and_text(sample: dict) -> tuple[str, str]:
    """The sentence that says what a thing is ("" for topics), and its documentation as far as the first answer has it."""
    answer = sample["conversations"][1]["content"]
    return ("", answer) if sample["id"].startswith("topic:") else tuple(re.split(r"(?<=\.)\s", answer, maxsplit=1))


def test_no_text_opens_alike_on_both_sides(sides):
    train, held_out = (
        {re.split(r"(?<=[.!?:])\s", opening_and_text(sample)[1])[0].casefold() for sample in side} for side in sides
    )
    assert train and held_out and not train & held_out


def test_no_text_comes_twice(sides):
    texts = [opening_and_text(sample)[1] for side in sides for sample in side]
    assert len(texts) == len(set(texts))


def test_an_answer_says_first_what_the_thing_is(sides):
    samples = {sample["id"]: sample["conversations"] for side in sides for sample in side}
    for identifier, opening in {
        "method:json.encoder.JSONEncoder.encode": "encode(self, o) is a method of json.encoder.JSONEncoder.",
        "function:json.dump": "dump is a function of json.",  # its signature is too long to quote
        "class:json.encoder.JSONEncoder": "JSONEncoder is a class of json.encoder.",
        "module:json": "json is a module of Python.",
        "function:builtins.abs": "abs(x, /) is a function of builtins.",
    }.items():
        question, answer, *_ = (message["content"] for message in samples[identifier])
        assert answer.startswith(opening)
        assert opening.split(" is a ")[0] in question


def test_both_sides_are_large_enough(sides):
    train, held_out = map(len, sides)
    assert train > 3000
    assert 0.02 < held_out / (train + held_out) < 0.1


def test_conversations_are_valid_and_roles_alternate(sides):
    for sample in sides[0] + sides[1]:
        messages, extra = read_messages(sample)
        assert isinstance(sample["id"], str) and extra == {}
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
