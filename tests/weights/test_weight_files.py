"""Files of weights that are not whole are refused in one message, which names the file, before any weight is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.host.weight_index import INDEX
from engine.weights.weight_files import (
    PICKLED,
    PICKLED_INDEX,
    SINGLE,
    find_weight_files,
    read_header,
)
from engine.weights.weight_reader import Checkpoint, PickledFile

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_shards(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    """A checkpoint of two files, with a tensor each, and its index."""
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file({name: torch.ones(64)}, folder / shard)
    index = {"weight_map": weight_map or dict(zip("ab", SHARDS, strict=True))}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("num_bytes", [0, 5, 40, 200])
def test_a_file_that_is_cut_off_anywhere_is_named(num_bytes, tmp_path):
    file = tmp_path / SINGLE
    save_file({"weight": torch.ones(64)}, file)
    assert read_header(file)["weight"]["shape"] == [64]
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=rf"{SINGLE} is (cut off|not whole).*fetch this file again") as error:
        Checkpoint(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [SINGLE, PICKLED, INDEX, PICKLED_INDEX])
def test_a_git_lfs_pointer_is_named_with_what_to_run(name, tmp_path):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        Checkpoint(str(tmp_path))


def test_a_file_of_another_format_is_named(tmp_path):
    (tmp_path / SINGLE).write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Checkpoint(str(tmp_path))


@pytest.mark.parametrize("content", ['{"weight_map": {"a": "mod', "[]", "{}", '{"weight_map": ["a"]}'])
def test_an_index_that_is_cut_off_is_named(content, tmp_path):
    write_shards(tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"{INDEX} is cut off or not an index of weights"):
        Checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors"])
def test_an_index_may_not_lead_out_of_its_folder(name, tmp_path):
    write_shards(tmp_path, {"a": SHARDS[0], "b": name})
    with pytest.raises(ValueError, match=f"names files outside of its folder: {name}"):
        Checkpoint(str(tmp_path))


def test_files_and_tensors_that_the_index_names_have_to_be_there(tmp_path):
    write_shards(tmp_path, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]})
    with pytest.raises(ValueError, match=f"c: not in {SHARDS[0]}"):
        Checkpoint(str(tmp_path))
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(ValueError, match=f"1 of the 2 files of {INDEX} are missing: {SHARDS[1]}"):
        Checkpoint(str(tmp_path))


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=f"holds no weights: expected one of {SINGLE}, {INDEX}, {PICKLED}"):
        find_weight_files(str(tmp_path))


def test_pickled_files_are_read_like_safetensors_and_run_no_code(tmp_path):
    weights = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
    for is_archive in (True, False):
        torch.save(weights, tmp_path / PICKLED, _use_new_zipfile_serialization=is_archive)
        checkpoint = Checkpoint(str(tmp_path))
        assert list(checkpoint) == ["a", "b"] and checkpoint.shape("a") == [3, 4]
        assert (checkpoint.stored_dtype("a"), checkpoint.stored_dtype("b")) == ("F32", "BF16")
        assert torch.equal(checkpoint.read("a"), weights["a"])
    torch.save({"a": Path("a class that is no tensor")}, tmp_path / PICKLED)
    with pytest.raises(ValueError, match=f"{PICKLED} cannot be read"):
        PickledFile(tmp_path / PICKLED)


def test_a_pickled_file_that_is_cut_off_is_named(tmp_path):
    file = tmp_path / PICKLED
    torch.save({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"{PICKLED} is cut off: it has 2,000 bytes"):
        Checkpoint(str(tmp_path))
