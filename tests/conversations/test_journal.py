"""What was finished is found again, whatever was cut off behind it, and is never mixed with what other options made."""

import json
from pathlib import Path

import pytest

from engine.conversations.journal import Journal, JournalError
from engine.conversations.regenerate import partial_of
from tests.conversations.chat_server import read_lines

OPTIONS = {"regenerate.model": "tiny", "regenerate.temperature": 0.0, "data.template_kwargs": {"b": 1, "a": None}}
SAMPLES = {3: {"text": "drei ü \u2028"}, 0: {"text": "null"}, 11: {"text": "elf", "deep": [{"x": 1.5}]}}


def written(path: Path) -> bytes:
    with Journal(path, OPTIONS) as journal:
        for line, sample in SAMPLES.items():
            journal.add(line, sample)
    return path.read_bytes()


def test_what_was_added_comes_out_once_in_the_order_of_the_inputs(tmp_path):
    written(tmp_path / "partial")
    with Journal(tmp_path / "partial", OPTIONS) as journal:
        assert len(journal) == 3 and [line for line in range(20) if line in journal] == [0, 3, 11]
        journal.add(5, {"text": "fünf"})
        journal.write_to(tmp_path / "out.jsonl")
        journal.add(4, {"text": "after reading"})
    expected = [SAMPLES[0], SAMPLES[3], {"text": "fünf"}, SAMPLES[11]]
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()] == expected
    with Journal(tmp_path / "partial", OPTIONS) as journal:
        assert list(journal.samples())[2] == {"text": "after reading"}
        journal.delete()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_the_output_is_written_while_the_journal_beside_it_is_read(tmp_path):
    output = tmp_path / "out.jsonl"
    written(partial_of(output))
    with Journal(partial_of(output), OPTIONS) as journal:
        journal.write_to(output)
        assert [json.loads(line) for line in output.read_bytes().splitlines()] == [SAMPLES[0], SAMPLES[3], SAMPLES[11]]
        assert list(journal.samples()) == [SAMPLES[0], SAMPLES[3], SAMPLES[11]]


def test_cut_off_at_any_byte_it_keeps_every_whole_conversation(tmp_path):
    path = tmp_path / "partial"
    content = written(path)
    whole = [content[:end].count(b"\n") - 1 for end in range(len(content) + 1)]
    for end, count in enumerate(whole):
        path.write_bytes(content[:end])
        with Journal(path, OPTIONS) as journal:
            assert list(journal.samples()) == [SAMPLES[line] for line in sorted(list(SAMPLES)[: max(0, count)])]
            missing = [line for line in SAMPLES if line not in journal]
            for line in missing:
                journal.add(line, SAMPLES[line])
        assert path.read_bytes() == content


def test_it_is_in_the_file_as_soon_as_it_is_added(tmp_path):
    with Journal(tmp_path / "partial", OPTIONS) as journal:
        journal.add(7, {"text": "here"})
        assert read_lines(tmp_path / "partial")[1] == {"line": 7, "sample": {"text": "here"}}


@pytest.mark.parametrize("changed", list(OPTIONS))
def test_another_job_s_journal_is_refused_and_left_as_it_is(changed, tmp_path):
    content = written(tmp_path / "partial")
    with pytest.raises(JournalError, match=rf"{changed}: .*, now 'new'\. Restore these, .* or delete .*partial") as refusal:
        Journal(tmp_path / "partial", OPTIONS | {changed: "new"})
    assert not [name for name in OPTIONS if name != changed and name in str(refusal.value)]
    assert (tmp_path / "partial").read_bytes() == content


@pytest.mark.parametrize("content", [b"a line of someone's\n", b"no end", b"[1]\n", b'{"format": "x", "decided_by": {}}\n'])
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(content, tmp_path):
    (tmp_path / "partial").write_bytes(content)
    with pytest.raises(JournalError, match="is not a journal"):
        Journal(tmp_path / "partial", OPTIONS)
    assert (tmp_path / "partial").read_bytes() == content


def test_an_altered_line_in_its_middle_is_named(tmp_path):
    lines = written(tmp_path / "partial").splitlines(keepends=True)
    (tmp_path / "partial").write_bytes(b"".join([lines[0], b"\0\0\n", *lines[2:]]))
    with pytest.raises(JournalError, match="partial:2 is not what was written .* delete that line"):
        Journal(tmp_path / "partial", OPTIONS)


def test_one_process_at_a_time_writes_it(tmp_path):
    with (
        Journal(tmp_path / "partial", OPTIONS),
        pytest.raises(JournalError, match="another process writes .*partial"),
    ):
        Journal(tmp_path / "partial", OPTIONS)
    assert len(Journal(tmp_path / "partial", OPTIONS)) == 0


def test_an_output_that_cannot_be_written_whole_leaves_the_earlier_one(tmp_path):
    (tmp_path / "out.jsonl").write_text("earlier")
    with Journal(tmp_path / "partial", OPTIONS) as journal:
        journal.add(0, {"text": "whole"})
        journal.add(1, {"text": "soon gone"})
        with (tmp_path / "partial").open("r+b") as file:
            file.truncate((tmp_path / "partial").stat().st_size - 5)
        with pytest.raises(ValueError):
            journal.write_to(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "earlier"
