"""Files appear whole, with the user's umask, and a failed write is one error with the file's name."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.data import cpython_corpus
from engine.evaluation.report import RunReport
from engine.host import files
from engine.host.files import WriteError, is_plain_name, write_json, write_tensors, write_text, write_whole, writing
from engine.models.draft_folder import save_vocab_map
from engine.models.vocab_map import VocabMap
from launcher.command import stop


@pytest.fixture
def full_disk(monkeypatch):
    """Whatever is written does not reach the disk."""

    def fails(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", fails)


@pytest.fixture(params=[0o002, 0o022, 0o077], ids=oct)
def mode(request):
    """The mode of files under a umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_files_are_readable_as_the_umask_says(mode, tmp_path):
    write_text(tmp_path / "text", "words")
    write_json(tmp_path / "json", {"a": 1}, shared=True)
    write_tensors(tmp_path / "tensors", {"a": torch.zeros(2)}, {"format": "pt"})
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert found == {"text": mode, "json": mode, "tensors": mode}
    assert load_file(tmp_path / "tensors")["a"].tolist() == [0, 0]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def half(place):
        place.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError, match="summary.json cannot be written: No space left on device; free some space"):
        write_whole(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_device_is_written_directly_and_a_link_stays_one():
    before = os.stat("/dev/full")
    with pytest.raises(WriteError, match="/dev/full cannot be written: No space left on device"):
        write_text("/dev/full", "words")
    with pytest.raises(WriteError, match="/dev/full cannot be written: it is not a regular file"):
        write_tensors("/dev/full", {"a": torch.zeros(2)})
    assert os.stat("/dev/full").st_rdev == before.st_rdev


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "words")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "words"


def test_every_librarys_full_disk_is_one_error(tmp_path):
    with pytest.raises(WriteError, match="state.pt cannot be written: .*\n?"), writing(tmp_path / "state.pt"):
        torch.save({"a": torch.zeros(10_000)}, "/dev/full")
    with pytest.raises(RuntimeError, match="something else"), writing(tmp_path):
        raise RuntimeError("something else")


def test_a_full_disk_at_corpus_vocabulary_and_summary_is_one_line(full_disk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpython_corpus, "cpython_conversations", lambda: iter([({"id": "a"}, False)]))
    vocab_map = VocabMap.most_frequent(torch.arange(8), 4, [])
    writers = {
        "train.jsonl": lambda: cpython_corpus.write_corpus(tmp_path),
        "summary.json": RunReport(tmp_path, {}, 1.0).save,
        "vocab_map.safetensors": lambda: save_vocab_map(vocab_map, tmp_path / "vocab_map.safetensors"),
    }
    for name, write in writers.items():
        with pytest.raises(WriteError) as error:
            write()
        with pytest.raises(SystemExit) as ended:
            stop(error.value, rank=0)
        message = str(ended.value)
        assert f"{tmp_path / name} cannot be written: No space left on device" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_only_names_without_a_path_are_plain():
    assert is_plain_name("shard-00000.safetensors")
    for name in ("../x", "/x", "a/b", "a\\b", "..", ".", "", ".hidden", "a\0", None, 3, ["x"]):
        assert not is_plain_name(name), name


def test_a_pipe_is_written_directly(tmp_path):
    reading, writing_end = os.pipe()
    write_text(Path(f"/dev/fd/{writing_end}"), "words")
    os.close(writing_end)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "words"


def test_a_file_that_cannot_be_read_while_another_is_written_is_named_itself(tmp_path):
    missing = tmp_path / "source"
    with pytest.raises(FileNotFoundError) as error:
        write_whole(tmp_path / "out", lambda place: place.write_bytes(missing.read_bytes()))
    assert error.value.filename == str(missing)
    assert list(tmp_path.iterdir()) == []
