"""A store is read as it was captured, and what was done to it since is found and named."""

import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from engine.config.recipe import load_config
from engine.data.dataset import load_documents
from engine.data.packing import collate
from engine.hidden_states.store_format import MANIFEST, Manifest, StoreError
from engine.hidden_states.store_reader import open_store
from engine.hidden_states.stored_target import StoredTarget
from engine.host.mapped_files import shared_pool
from engine.models.training_rows import allowed_rows, slots_of
from launcher.command import with_store
from tests.captures import capture_config, run_capture


@pytest.fixture(scope="module")
def captured(tmp_path_factory, tiny_target, tiny_corpus):
    """A store and the configuration it was captured with."""
    config = capture_config(tmp_path_factory.mktemp("captured") / "store", tiny_target, tiny_corpus.train)
    run_capture(config)
    return config


@pytest.fixture
def store(captured, tmp_path):
    """A copy that a test may harm."""
    return shutil.copytree(captured.target.store, tmp_path / "store")


def shards_of(store):
    return sorted(store.glob("*.safetensors"))


def harm(path, at: float) -> None:
    """Change one bit, at a share of the file's length."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def test_its_documents_are_the_conversations(captured):
    opened = open_store(Path(captured.target.store), skip_bad=False)
    tokenizer = AutoTokenizer.from_pretrained(captured.target.path)
    documents, _ = load_documents(captured.data.train, tokenizer, captured.data)
    assert len(opened.documents) == len(documents) and len(opened.documents.shards) > 5
    for stored, document in zip(opened.documents, documents, strict=True):
        assert np.array_equal(stored.input_ids, document.input_ids)
        assert np.array_equal(stored.assistant_mask, document.assistant_mask)
    with pytest.raises(IndexError):
        opened.documents[len(documents)]


def test_a_shard_cut_off_missing_or_of_another_store_is_named(store):
    first, second, *_, last = shards_of(store)
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(StoreError, match=rf"{first.name}: expected [\d,]+ bytes, found"):
        open_store(store, skip_bad=False)
    first.unlink()
    with pytest.raises(StoreError, match=f"{first.name}: the shard is missing"):
        open_store(store, skip_bad=False)
    shutil.copy(second, first)
    with pytest.raises(StoreError, match=first.name):
        open_store(store, skip_bad=False)
    opened = open_store(store, skip_bad=True)
    assert len(opened.problems) == 1 and first.name in opened.problems[0]
    assert len(opened.documents) == Manifest.read(store).num_documents - Manifest.read(store).shards[0].num_documents
    assert last in [shard.path for shard in opened.documents.shards]


@pytest.mark.parametrize("at", [0.001, 0.02, 0.3, 0.7, 1.0])
def test_a_changed_bit_is_found_before_it_is_learned_from(store, at):
    shard = shards_of(store)[1]
    harm(shard, at)
    with pytest.raises(StoreError, match=shard.name):
        opened = open_store(store, skip_bad=False).documents
        for index in range(len(opened)):
            found, own = opened.find(index)
            found.verify(own)


def test_a_capture_that_has_not_ended_is_not_trained_from_unasked(store):
    manifest = Manifest.read(store)
    text = (store / MANIFEST).read_text().replace(f'"{manifest.shards[-1].checksum}"', "null")
    (store / MANIFEST).write_text(text)
    with pytest.raises(StoreError, match=rf"not complete, {len(manifest.shards)} of {len(manifest.shards)} shards"):
        open_store(store, skip_bad=False)
    assert len(open_store(store, skip_bad=True).documents) == manifest.num_documents
    for shard in shards_of(store):
        shard.unlink()
    with pytest.raises(StoreError, match="no shard can be read"):
        open_store(store, skip_bad=True)


def test_other_options_than_the_captures_are_refused(store):
    opened = open_store(store, skip_bad=False)
    opened.check(aux_layers=None, mask_alignment="inference", temperature=1.0)
    with pytest.raises(StoreError, match="mask_alignment = inference, this run asks for specforge"):
        opened.check(mask_alignment="specforge")
    with pytest.raises(StoreError, match="fp8_activations = False, this run asks for True"):
        opened.check(fp8_activations=True)
    with pytest.raises(StoreError, match=r"aux_layers = \(0, 1, 3\)"):
        opened.check(aux_layers=(0, 1, 2))


def test_more_shards_than_files_that_may_be_open_are_read(captured, monkeypatch):
    folder = Path(captured.target.store)
    num_open = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_spare = 16
    assert len(shards_of(folder)) > num_spare
    shared_pool.cache_clear()
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + num_spare, hard))
    try:
        opened = open_store(folder, skip_bad=False)
        stored = StoredTarget(opened, torch.device("cpu"))
        ids = tuple(range(len(opened.documents)))
        batch = replace(collate([opened.documents[index] for index in ids]), document_ids=ids)
        slots_N = slots_of(allowed_rows(batch, captured.ttt))
        first, again = (stored.read(batch, slots_N) for _ in range(2))
        assert 0 < len(shared_pool()) <= num_spare
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        shared_pool.cache_clear()
    assert all(torch.equal(first[name], again[name]) for name in first)
    whole = StoredTarget(open_store(folder, skip_bad=False), torch.device("cpu")).read(batch, slots_N)
    assert all(torch.equal(first[name], whole[name]) for name in whole)


def train_from(store: Path) -> None:
    """What a training run does with a store before its first step."""
    with_store(load_config(None, [f"target.store={store}"]))
    StoredTarget(open_store(store, skip_bad=False), torch.device("cpu"))


@pytest.mark.parametrize("name", ["head.safetensors", "tokenizer.json", "config.json"])
def test_an_altered_or_missing_file_of_the_target_is_refused(store, name):
    train_from(store)
    path = store / "target" / name
    harm(path, 0.6)
    with pytest.raises(StoreError, match=rf"target/{name} was altered: .*SHA-256.*run the capture again"):
        train_from(store)
    with pytest.raises(StoreError, match="was altered"):  # also without a launcher
        StoredTarget(open_store(store, skip_bad=False), torch.device("cpu"))
    path.unlink()
    with pytest.raises(StoreError, match=rf"target/{name} is missing; .*run the capture again"):
        train_from(store)


def test_a_store_of_before_these_checksums_still_opens(store):
    values = json.loads((store / MANIFEST).read_text())
    assert len(values.pop("target_files")) > 3
    (store / MANIFEST).write_text(json.dumps(values))
    train_from(store)
    (store / "target" / "head.safetensors").unlink()
    with pytest.raises(StoreError, match=r"head\.safetensors is missing"):
        train_from(store)


@pytest.mark.parametrize("files", [["head.safetensors"], {"../config.json": "0"}, {"": "0"}, {"/etc/passwd": "0"}, {"a": 5}])
def test_a_manifest_whose_target_files_leave_the_folder_is_refused(store, files):
    values = json.loads((store / MANIFEST).read_text())
    values["target_files"] = files
    (store / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(StoreError, match="names files of its target"):
        open_store(store, skip_bad=True)
