import datetime
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.config.sections import DataSection
from engine.data import tokenised
from engine.data.dataset import Scan, load_documents
from engine.data.tokenised import IDS, entry_name, tokenise
from tests.data.chat_formats import chat, make_tokenizer
from tests.distributed import start_process
from tests.waiting import wait_until

NAME = "qwen3"  # conversations of several turns become several documents


@pytest.fixture
def paths(write_jsonl):
    rng = np.random.default_rng(0)
    samples = [chat(*("word " * int(n) for n in rng.integers(1, 30, 2 * int(rng.integers(1, 4))))) for _ in range(60)]
    first = [*samples[:40], {"conversations": []}, b"\xff broken", chat("q", "long " * 300)]
    return [write_jsonl(*first, name="a.jsonl"), write_jsonl(*samples[40:], name="b.jsonl")]


@pytest.fixture
def section(tmp_path):
    return DataSection(cache_dir=str(tmp_path / "cache"), max_tokens=400, long_documents="split", max_bad_share=0.1)


def assert_same(documents, others):
    assert len(documents) == len(others) > 0
    for one, other in zip(documents, others, strict=True):
        assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.assistant_mask, other.assistant_mask)
        assert one.turn_ends == other.turn_ends
    for fact in ("lengths", "assistant_tokens", "token_counts"):
        assert np.array_equal(getattr(documents, fact), getattr(others, fact))
    assert documents.checksum == others.checksum


def entries(section):
    return sorted(path.name for path in Path(section.cache_dir).iterdir() if path.is_dir())


@pytest.mark.parametrize("workers", [1, 3])
def test_the_cache_gives_what_one_process_reads_into_memory(paths, section, workers, monkeypatch):
    monkeypatch.setattr(tokenised, "Scan", SmallChunks)
    tokenizer = make_tokenizer(NAME)
    plain, plain_report = load_documents(paths, tokenizer, section)
    for _ in range(2):  # made, and found
        documents, report = tokenise(paths, tokenizer, replace(section, workers=workers), builds=True)
        assert_same(documents, plain)
        assert report == plain_report
        assert "a.jsonl:42: byte 0" in report.summary() and "too long: " in report.summary()


class SmallChunks:
    @staticmethod
    def of(paths):
        return Scan.of(paths, chunk_bytes=2_000)


def test_chunks_are_the_files_line_by_line(paths):
    for chunk_bytes in (1, 100, 5_000, 1 << 20):
        scan = Scan.of(paths, chunk_bytes)
        for number, path in enumerate(paths):
            found = [pair for chunk in scan.chunks if chunk.file == number for pair in chunk.lines()]
            lines = Path(path).read_bytes().split(b"\n")
            assert found == [(index, line) for index, line in enumerate(lines, start=1) if line.strip()]
        assert scan.num_bytes == sum(Path(path).stat().st_size for path in paths)
        assert scan.content == Scan.of(paths).content


def test_found_conversations_are_not_rendered_again(paths, section, monkeypatch):
    tokenizer = make_tokenizer(NAME)
    seen = []
    tokenise(paths, tokenizer, section, builds=True, on_progress=lambda done, total: seen.append(done / total))
    assert seen[-1] == 1
    monkeypatch.setattr(tokenised, "Renderer", None)
    tokenise(paths, tokenizer, section, builds=True)
    tokenise(paths, tokenizer, section, builds=False)
    assert len(entries(section)) == 1


def test_an_entry_serves_the_same_conversations_under_other_names(paths, section, tmp_path):
    tokenizer = make_tokenizer(NAME)
    tokenise(paths, tokenizer, section, builds=True)
    (tmp_path / "moved.jsonl").write_bytes(Path(paths[0]).read_bytes())
    _, report = tokenise([str(tmp_path / "moved.jsonl"), paths[1]], tokenizer, section, builds=False)
    assert any(place.endswith("moved.jsonl:42") for place, *_ in report.bad)


def test_whatever_decides_the_documents_decides_the_name(paths, section, write_jsonl):
    tokenizer = make_tokenizer(NAME)
    scan = Scan.of(paths)
    other_template = make_tokenizer(NAME)
    other_template.chat_template += "{# mine #}"
    more_words = make_tokenizer(NAME)
    more_words.add_tokens(["word"])
    names = [
        entry_name(scan, tokenizer, section),
        entry_name(Scan.of(paths[:1]), tokenizer, section),
        entry_name(Scan.of([paths[0], write_jsonl(chat("q", "a"), name="b.jsonl")]), tokenizer, section),
        entry_name(scan, other_template, section),
        entry_name(scan, more_words, section),
        *(
            entry_name(scan, tokenizer, replace(section, **change))
            for change in (
                {"max_tokens": 90},
                {"long_documents": "cut"},
                {"train_on": "last"},
                {"turns": "each"},
                {"template_kwargs": {"enable_thinking": False}},
            )
        ),
    ]
    assert len(set(names)) == len(names)
    indifferent = replace(section, workers=2, max_bad_share=0.9, balance_steps=1, cache_dir="elsewhere")
    assert entry_name(Scan.of(paths[:1]), tokenizer, indifferent) == names[1]


def test_too_many_bad_samples_stop_a_run_without_losing_the_work(paths, section, monkeypatch):
    tokenizer = make_tokenizer(NAME)
    with pytest.raises(ValueError, match=r"data\.max_bad_share allows 1\.0%"):
        tokenise(paths, tokenizer, replace(section, max_bad_share=0.01), builds=True)
    monkeypatch.setattr(tokenised, "Renderer", None)
    assert len(tokenise(paths, tokenizer, section, builds=False)[0]) > 0


def without_end(data: bytes) -> bytes:
    return data[:-7]


def with_a_changed_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "name, harmed",
    [
        *((name, harmed) for name in tokenised.HASHED for harmed in (without_end, with_a_changed_bit)),
        (tokenised.REPORT, without_end),
    ],
)
def test_a_damaged_entry_is_made_again_with_a_warning(paths, section, name, harmed):
    tokenizer = make_tokenizer(NAME)
    warnings = []
    tokenise(paths, tokenizer, section, builds=True, warn=warnings.append)
    assert not warnings, "an entry that was not there is not damaged"
    (entry,) = entries(section)
    path = Path(section.cache_dir, entry, name)
    path.write_bytes(harmed(path.read_bytes()))
    documents, _ = tokenise(paths, tokenizer, section, builds=True, warn=warnings.append)
    assert_same(documents, load_documents(paths, tokenizer, section)[0])
    (warning,) = warnings
    assert str(path.parent) in warning and "tokenised again" in warning
    assert_same(tokenise(paths, tokenizer, section, builds=False)[0], documents)


def test_a_rank_that_does_not_build_waits_for_a_damaged_entry_to_be_replaced(paths, section, monkeypatch):
    tokenizer = make_tokenizer(NAME)
    tokenise(paths, tokenizer, section, builds=True)
    (entry,) = entries(section)
    path = Path(section.cache_dir, entry, IDS)
    path.write_bytes(with_a_changed_bit(path.read_bytes()))
    monkeypatch.setattr(tokenised, "SECONDS_WITHOUT_SIGN", 0.1)
    with pytest.raises(ValueError, match="no process is building"):
        tokenise(paths, tokenizer, section, builds=False)


def test_a_file_that_changes_while_it_is_read_leaves_nothing(paths, section, monkeypatch):
    def rewritten(scan, renderer):
        path = Path(paths[0])
        before = path.stat()
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))  # file systems may round times
        yield from ((chunk, renderer(chunk)) for chunk in scan.chunks)

    monkeypatch.setattr(tokenised, "rendered_chunks", rewritten)
    with pytest.raises(ValueError, match=r"a\.jsonl: changed while it was read"):
        tokenise(paths, make_tokenizer(NAME), section, builds=True)
    assert entries(section) == []


def test_special_tokens_and_the_day_that_a_template_writes_decide_the_name(paths, section, monkeypatch):
    scan = Scan.of(paths)
    tokenizer = make_tokenizer("llama3")
    other = make_tokenizer("llama3")
    other.bos_token = "<|end_of_text|>"
    assert entry_name(scan, tokenizer, section) != entry_name(scan, other, section)
    tokenizer.chat_template += "{{ strftime_now('%d') }}"
    today = entry_name(scan, tokenizer, section)

    class Tomorrow(tokenised.date):
        @classmethod
        def today(cls):
            return datetime.date(2999, 1, 1)

    monkeypatch.setattr(tokenised, "date", Tomorrow)
    assert entry_name(scan, tokenizer, section) != today


def test_a_rank_does_not_wait_for_ever_for_one_that_is_gone(paths, section, monkeypatch):
    monkeypatch.setattr(tokenised, "SECONDS_WITHOUT_SIGN", 0.5)
    with pytest.raises(ValueError, match="no process is building .* this rank is waiting for it"):
        tokenise(paths, make_tokenizer(NAME), section, builds=False)


def test_a_file_without_a_usable_conversation_leaves_nothing(paths, section, write_jsonl):
    with pytest.raises(ValueError, match=r"empty_talk\.jsonl: no conversation"):
        tokenise([paths[0], write_jsonl({}, name="empty_talk.jsonl")], make_tokenizer(NAME), section, builds=True)
    assert entries(section) == []


def test_a_folder_that_cannot_be_written_is_named(paths, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"another folder in data\.cache_dir"):
        tokenise(paths, make_tokenizer(NAME), DataSection(cache_dir=str(tmp_path / "file" / "cache")), builds=True)


def test_a_full_disk_is_named_and_leaves_nothing(paths, section, monkeypatch):
    def full(writer, documents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenised.Writer, "add", full)
    with pytest.raises(ValueError, match="No space left on device; free some space"):
        tokenise(paths, make_tokenizer(NAME), section, builds=True)
    assert entries(section) == []


def build_slowly(paths, section, builds, seconds, result):
    """A rank: makes the entry, each chunk taking a while, or waits for it."""
    tokenised.Scan = SmallChunks
    render = tokenised.Renderer.__call__

    def slow(self, chunk):
        time.sleep(seconds)
        return render(self, chunk)

    tokenised.Renderer.__call__ = slow
    documents, _ = tokenise(paths, make_tokenizer(NAME), section, builds=builds)
    Path(result).write_text(json.dumps([len(documents), documents.checksum, os.getpid()]))


def test_ranks_and_runs_that_come_together_make_an_entry_once(paths, section, tmp_path):
    results = [str(tmp_path / f"rank{rank}.json") for rank in range(4)]
    ranks = [
        start_process(build_slowly, paths, section, builds, 0.05, result)
        for builds, result in zip((True, True, False, False), results, strict=True)
    ]
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    found = [json.loads(Path(result).read_text())[:2] for result in results]
    assert found == [found[0]] * 4 and len(entries(section)) == 1


def build_until_killed(paths, section, marker):
    """Build the entry, and wait to be killed after the first chunk; `marker` is created then."""
    tokenised.Scan = SmallChunks
    render = tokenised.Renderer.__call__
    rendered = []

    def render_one(self, chunk):
        if rendered:
            marker.touch()
            time.sleep(600)
        rendered.append(chunk)
        return render(self, chunk)

    tokenised.Renderer.__call__ = render_one
    tokenise(paths, make_tokenizer(NAME), section, builds=True)


def test_a_killed_process_leaves_no_entry_and_no_lock(paths, section, tmp_path):
    marker = tmp_path / "building"
    killed = start_process(build_until_killed, paths, section, marker)
    wait_until(marker.exists, 240, killed.is_alive)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert list(Path(section.cache_dir).glob("*.partial-*/*"))
    assert all(".partial-" in name for name in entries(section))
    tokenizer = make_tokenizer(NAME)
    assert_same(tokenise(paths, tokenizer, section, builds=True)[0], load_documents(paths, tokenizer, section)[0])
    assert len(entries(section)) == 1


def die(chunk):
    os.abort()


def test_a_worker_that_dies_is_one_clear_error(paths, section, monkeypatch):
    monkeypatch.setattr(tokenised, "_render_chunk", die)
    with pytest.raises(ValueError, match=r"run again with a lower data\.workers than 2"):
        tokenise(paths, make_tokenizer(NAME), replace(section, workers=2), builds=True)
    assert entries(section) == []
