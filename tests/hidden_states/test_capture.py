"""A capture survives whatever ends it, and what it leaves is what the target said."""

import errno
import json
import os
import random
import shutil
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.batch import StateFaults
from engine.config.sections import Config
from engine.data.packed_loader import PackedLoader
from engine.data.packing import collate
from engine.hidden_states.finite import NonFiniteError, find_faults
from engine.hidden_states.sources import StoredSource
from engine.hidden_states.store_format import MANIFEST, Manifest, StoreError
from engine.hidden_states.store_reader import open_store
from engine.hidden_states.store_upkeep import check_store, merge_stores
from engine.hidden_states.store_writer import ShardFile
from engine.hidden_states.stored_target import StoredTarget
from engine.host.telemetry import Telemetry
from engine.models.training_rows import allowed_rows, slots_of
from engine.parallel.mesh import World
from engine.target.frozen import FrozenTarget
from tests.captures import capture_config, run_capture
from tests.distributed import NUM_KILLS, run_ranks, start_process
from tests.published import Weights, change_weights
from tests.waiting import wait_until
from tests.weights.test_quantised_checkpoint import to_fp8

CPU = torch.device("cpu")


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def capture_until(config: Config, number: int, is_written: bool, marker: Path) -> None:
    """Capture until a shard of this process is complete, and wait there to be killed.

    number: of the shard, from 1. is_written: whether it already has its final name. marker: file that is created then.
    """
    finish = ShardFile.finish
    lock = threading.Lock()
    begun = []

    def wait_to_be_killed() -> None:
        marker.touch()
        time.sleep(600)

    def finish_or_wait(file: ShardFile) -> None:
        with lock:  # other threads complete no shard meanwhile
            begun.append(file)
            if len(begun) == number and not is_written:
                wait_to_be_killed()
            finish(file)
            if len(begun) == number:
                wait_to_be_killed()

    ShardFile.finish = finish_or_wait
    run_capture(config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_target, tiny_corpus) -> dict[str, bytes]:
    """The files of a capture that nothing interrupted."""
    store = tmp_path_factory.mktemp("whole") / "store"
    run_capture(capture_config(store, tiny_target, tiny_corpus.train))
    (store.parent / "mine").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in store.rglob("*") if path.is_file()}
    assert modes == {stat.S_IMODE((store.parent / "mine").stat().st_mode)}, "files are readable as the umask says"
    return files(store)


def test_killed_again_and_again_it_still_leaves_the_same_store(whole, tmp_path, tiny_target, tiny_corpus):
    store = tmp_path / "store"
    config = capture_config(store, tiny_target, tiny_corpus.train)
    generator = random.Random(0)
    num_shards = sum(name.startswith("shard-") for name in whole)
    num_written = 0
    seen = set()
    for kill in range(NUM_KILLS):
        # Each capture may complete its share of the shards that are missing, so that some are left for the last one.
        num_missing = num_shards - num_written
        number = generator.randint(1, max(1, num_missing // (NUM_KILLS - kill)))
        is_written = number < num_missing and generator.random() < 0.5
        marker = tmp_path / f"killed_{kill}"
        process = start_process(capture_until, config, number, is_written, marker)
        wait_until(marker.exists, 240, process.is_alive)
        process.kill()
        process.join()
        num_written = len(list(store.glob("shard-*.safetensors")))
        assert num_written < num_shards
        seen.add(num_written)
    assert len(seen) > NUM_KILLS // 4, "it was stopped at many places"
    run_capture(config)
    assert files(store) == whole


def capture_on_ranks(world: World, config: Config) -> int:
    return run_capture(config, world).new_bytes


def test_any_number_of_ranks_leaves_the_same_store_and_may_continue_anothers(whole, tmp_path, tiny_target, tiny_corpus):
    config = capture_config(tmp_path / "store", tiny_target, tiny_corpus.train)
    assert all(run_ranks(capture_on_ranks, 2, config))
    assert files(tmp_path / "store") == whole
    for path in list((tmp_path / "store").glob("*.safetensors"))[::2]:
        path.unlink()
    head = tmp_path / "store" / "target" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"?")
    run_capture(config)
    assert files(tmp_path / "store") == whole, "also the head, which was damaged"
    assert run_capture(config).new_bytes == 0


def test_a_disk_that_fills_up_ends_it_cleanly_and_it_goes_on(whole, tmp_path, tiny_target, tiny_corpus, monkeypatch):
    config = capture_config(tmp_path / "store", tiny_target, tiny_corpus.train)
    reserve = os.posix_fallocate

    def full(file: int, offset: int, length: int) -> None:
        if len(list((tmp_path / "store").glob("shard-*"))) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match="the disk is full; [23] of this rank's .* same command"):
            run_capture(config)
    assert not list((tmp_path / "store").glob("*.partial"))
    run_capture(config)
    assert files(tmp_path / "store") == whole


def test_a_writer_that_fails_ends_it(tmp_path, tiny_target, tiny_corpus, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run_capture(capture_config(tmp_path / "store", tiny_target, tiny_corpus.train))


def test_a_store_that_does_not_fit_is_refused_before_the_first_byte(tmp_path, tiny_target, tiny_corpus, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(StoreError, match=r"needs .* GiB, its disk has .* GiB free; .*float8_e4m3"):
        run_capture(capture_config(tmp_path / "store", tiny_target, tiny_corpus.train))
    assert not (tmp_path / "store").exists()


def test_another_capture_is_not_continued(tmp_path, tiny_target, tiny_corpus):
    run_capture(capture_config(tmp_path / "store", tiny_target, tiny_corpus.train))
    before = files(tmp_path / "store")
    with pytest.raises(StoreError, match="mask_alignment: 'inference', now 'specforge'.*Restore these"):
        run_capture(capture_config(tmp_path / "store", tiny_target, tiny_corpus.train, "ttt.mask_alignment=specforge"))
    with pytest.raises(StoreError, match="conversations: 40 documents, now 4, or other content"):
        run_capture(capture_config(tmp_path / "store", tiny_target, tiny_corpus.held_out))
    assert files(tmp_path / "store") == before


def with_other_weights(target: Path, folder: Path) -> Path:
    """A copy of a target, one of whose tensors was trained a little more."""
    shutil.copytree(target, folder, dirs_exist_ok=True)

    def train_more(weights: Weights) -> None:
        weights["model.layers.2.mlp.up_proj.weight"] *= 1.01

    change_weights(folder, train_more)
    return folder


def test_a_capture_is_not_continued_with_other_weights_at_the_same_path(tmp_path, tiny_target, tiny_corpus):
    target = shutil.copytree(tiny_target, tmp_path / "target")
    config = capture_config(tmp_path / "store", target, tiny_corpus.train)
    run_capture(config)
    kept, *others = sorted((tmp_path / "store").glob("shard-*"))
    for shard in others:
        shard.unlink()
    before = kept.read_bytes()
    with_other_weights(tiny_target, target)
    with pytest.raises(StoreError, match="holds another capture: target_identity: .*the target's weights or its config"):
        run_capture(config)
    assert kept.read_bytes() == before and not others[0].exists()


def test_an_old_capture_without_an_identity_is_continued_and_says_so(tmp_path, tiny_target, tiny_corpus, capsys):
    config = capture_config(tmp_path / "store", tiny_target, tiny_corpus.train)
    run_capture(config)
    path = tmp_path / "store" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["contents"]["target_identity"]
    path.write_text(json.dumps(manifest))
    sorted((tmp_path / "store").glob("shard-*"))[0].unlink()
    run_capture(config)
    assert "begun before the target's identity was recorded" in " ".join(capsys.readouterr().out.split())
    assert json.loads(path.read_text())["contents"]["target_identity"] is None
    assert open_store(tmp_path / "store", skip_bad=False).contents.target_identity is None


def test_captures_with_and_without_quantised_activations_are_not_mixed(tmp_path, tiny_target, tiny_corpus):
    target = shutil.copytree(tiny_target, tmp_path / "target")
    plain = capture_config(tmp_path / "store", target, tiny_corpus.train)
    quantised = capture_config(tmp_path / "store", target, tiny_corpus.train, "target.fp8_activations=true")
    with pytest.raises(ValueError, match="fp8_activations=true.*not in fp8"):
        run_capture(quantised)
    to_fp8(target, (8, 8))
    run_capture(quantised)
    with pytest.raises(StoreError, match="fp8_activations: True, now False.*Restore these"):
        run_capture(plain)
    opened = open_store(tmp_path / "store", skip_bad=False)
    with pytest.raises(StoreError, match="fp8_activations = True, this run asks for False"):
        StoredSource(plain, World.alone(), Telemetry(speaks=False))
    StoredSource(quantised, World.alone(), Telemetry(speaks=False))
    batch = replace(collate([opened.documents[index] for index in range(4)]), document_ids=(0, 1, 2, 3))
    slots_N = slots_of(allowed_rows(batch, plain.ttt))
    stored_TA = StoredTarget(opened, CPU)(batch, slots_N).aux_TA
    online, other = (FrozenTarget.load(config.target, CPU)(batch, slots_N).aux_TA for config in (quantised, plain))
    assert (stored_TA - online).norm() <= 1e-2 * online.norm() < (stored_TA - other).norm()


@pytest.mark.parametrize("alignment", ["inference", "specforge"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3"])
def test_what_is_read_is_what_the_target_says(dtype, alignment, tmp_path, tiny_target, tiny_corpus):
    options = f"store.dtype={dtype}", f"ttt.mask_alignment={alignment}", "loss.temperature=0.7"
    config = capture_config(tmp_path / "store", tiny_target, tiny_corpus.train, *options)
    run_capture(config)
    opened = open_store(tmp_path / "store", skip_bad=False)
    stored = StoredTarget(opened, CPU)
    online = FrozenTarget.load(config.target, CPU, temperature=0.7)
    assert torch.equal(stored.embedding.whole(), online.embedding.whole())
    ids_U = torch.tensor([3, 5, 40])
    assert torch.equal(stored.head_rows(ids_U).weight_VD, online.head_rows(ids_U).weight_VD)
    assert stored.head_rows(ids_U).temperature == 0.7
    sizes = {"max_tokens": 60, "packs_per_batch": 3, "rank": 0, "world_size": 1, "accumulation_steps": 1, "balance_steps": 8}
    tolerance = {"float32": 1e-5, "bfloat16": 2**-8, "float8_e4m3": 2**-4}[dtype]
    silent = 0
    for (batch,), _ in PackedLoader(opened.documents, **sizes, seed=3, epochs=1):
        slots_N = slots_of(allowed_rows(batch, config.ttt))
        silent += not batch.assistant_mask_T[-batch.host_lengths[-1] :].any()
        ours = stored(batch, slots_N)
        theirs = online(batch, slots_N)
        assert torch.equal(ours.slots_N, theirs.slots_N) and torch.equal(ours.argmax_N, theirs.argmax_N)
        torch.testing.assert_close(ours.lse_N, theirs.lse_N, rtol=1e-5, atol=1e-5)
        for name in ("aux_TA", "last_hidden_ND"):
            mine, truth = (getattr(output, name).float() for output in (ours, theirs))
            assert (mine - truth).norm() <= tolerance * truth.norm(), name
    assert silent, "the last step is filled up with packs that carry no loss"


def test_slots_that_were_not_captured_are_refused(tmp_path, tiny_target, tiny_corpus):
    config = capture_config(tmp_path / "store", tiny_target, tiny_corpus.train)
    run_capture(config)
    opened = open_store(tmp_path / "store", skip_bad=False)
    loader = PackedLoader(
        opened.documents,
        max_tokens=60,
        packs_per_batch=1,
        rank=0,
        world_size=1,
        accumulation_steps=1,
        seed=0,
        epochs=1,
        balance_steps=8,
    )
    (batch,), _ = next(iter(loader))
    with pytest.raises(StoreError, match="captured without all of the slots"):
        StoredTarget(opened, CPU)(batch, torch.arange(1, batch.num_tokens))


@pytest.mark.parametrize("pins", [True, False])
def test_states_on_their_way_to_a_gpu_are_read_into_pinned_memory(pins, tmp_path, tiny_target, tiny_corpus, monkeypatch):
    config = capture_config(tmp_path / "store", tiny_target, tiny_corpus.train)
    run_capture(config)
    opened = open_store(tmp_path / "store", skip_bad=False)
    stored = StoredTarget(opened, CPU)
    monkeypatch.setattr(stored, "_pins", pins)
    real_empty = torch.empty
    asked = []

    def empty(*shape, pin_memory: bool = False, **options) -> torch.Tensor:
        asked.append(pin_memory)
        return real_empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    batch = replace(collate([opened.documents[0]]), document_ids=(0,))
    found = stored.read(batch, slots_of(allowed_rows(batch, config.ttt)))
    assert len(asked) == sum(states is not None for states in found.values()) and set(asked) == {pins}


def test_the_manifest_says_what_serving_must_match(whole):
    manifest = json.loads(whole[MANIFEST])
    contents = manifest["contents"]
    assert contents["aux_layers"] == [0, 1, 3] and contents["dtype"] == "float32"
    assert all(len(contents[name]) == 16 for name in ("config_hash", "tokenizer_hash", "template_hash"))
    assert all(shard["checksum"] for shard in manifest["shards"])
    assert {"target/config.json", "target/tokenizer.json", "target/head.safetensors"} <= whole.keys()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/tmp/outside.safetensors", "target/head.safetensors", "", ".safetensors", 5]
)
def test_a_manifest_whose_shard_leaves_the_store_is_refused_before_anything_is_written(
    whole, tmp_path, tiny_target, tiny_corpus, name
):
    store = tmp_path / "store"
    store.mkdir()
    values = json.loads(whole[MANIFEST])
    values["shards"][0] |= {"name": name, "checksum": None}
    (store / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(StoreError, match="manifest.json names a shard"):
        run_capture(capture_config(store, tiny_target, tiny_corpus.train))
    with pytest.raises(StoreError, match="manifest.json names a shard"):
        open_store(store, skip_bad=True)
    with pytest.raises(StoreError, match="manifest.json names a shard"):
        merge_stores([store], tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [MANIFEST, "store"]


BAD_WORD = 17  # token id of a word that the corpus holds in a few documents


@pytest.fixture(scope="module")
def bad_target(tmp_path_factory, tiny_target) -> Path:
    """A target whose states are not finite from one word of a document on."""
    folder = shutil.copytree(tiny_target, tmp_path_factory.mktemp("bad") / "target")

    def spoil(weights: Weights) -> None:
        weights["model.embed_tokens.weight"][BAD_WORD, 3] = float("nan")

    change_weights(folder, spoil)
    return folder


def bad_documents(store: Path) -> list[int]:
    """Documents of a store with the word whose embedding is bad."""
    documents = open_store(store, skip_bad=False).documents
    return [index for index in range(len(documents)) if BAD_WORD in documents[index].input_ids]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3"])
def test_a_store_holds_no_state_that_is_not_finite(dtype, tmp_path, bad_target, tiny_target, tiny_corpus, capsys):
    store = tmp_path / "store"
    config = capture_config(store, bad_target, tiny_corpus.train, f"store.dtype={dtype}")
    report = run_capture(config)
    printed = capsys.readouterr().err
    check = check_store(store)
    assert not check.problems and not check.missing
    expected = bad_documents(store)
    manifest = Manifest.read(store)
    named = [shard.first_document + index for shard in manifest.shards for index in shard.left_out]
    assert named == expected and 0 < len(expected) == report.num_left_out < 20
    assert all(f"{tiny_corpus.train}:{index + 1}" in printed for index in expected[:20])
    assert "first in the output of layer 0 of the target" in printed

    opened = open_store(store, skip_bad=False)
    assert [index for index in range(40) if opened.documents.assistant_tokens[index] == 0] == expected
    run_capture(capture_config(tmp_path / "whole", tiny_target, tiny_corpus.train, f"store.dtype={dtype}"))
    whole = open_store(tmp_path / "whole", skip_bad=False)
    good = tuple(index for index in range(40) if index not in expected)
    batch = replace(collate([opened.documents[index] for index in good]), document_ids=good)
    slots_N = slots_of(allowed_rows(batch, config.ttt))
    ours, theirs = (StoredTarget(each, CPU)(batch, slots_N) for each in (opened, whole))
    assert torch.equal(ours.aux_TA, theirs.aux_TA) and torch.equal(ours.lse_N, theirs.lse_N)
    num_counted = sum(int(opened.documents.find(i)[0].slots(opened.documents.find(i)[1]).size) for i in good)
    assert opened.documents.count_argmax(64).sum() == num_counted, "those left out are in no draft vocabulary"

    before = files(store)
    for path in list(store.glob("*.safetensors"))[::2]:
        path.unlink()
    run_capture(config)
    assert files(store) == before, "a capture that goes on leaves the same bytes"


def test_a_capture_that_shall_stop_at_such_a_document_does(tmp_path, bad_target, tiny_corpus):
    config = capture_config(tmp_path / "store", bad_target, tiny_corpus.train, "target.non_finite=stop")
    with pytest.raises(StoreError, match=r"train.jsonl:\d+: NaN or infinity, .*target.non_finite=leave_out"):
        run_capture(config)
    assert not list((tmp_path / "store").glob("*.partial"))
    run_capture(capture_config(tmp_path / "store", bad_target, tiny_corpus.train))
    assert Manifest.read(tmp_path / "store").num_left_out == len(bad_documents(tmp_path / "store"))


def test_a_target_that_is_broken_ends_the_capture(tmp_path, tiny_target, tiny_corpus):
    folder = shutil.copytree(tiny_target, tmp_path / "target")

    def spoil(weights: Weights) -> None:
        weights["model.embed_tokens.weight"][30:] = float("inf")

    change_weights(folder, spoil)
    with pytest.raises(NonFiniteError, match="of .* documents so far .* the target itself is broken"):
        run_capture(capture_config(tmp_path / "store", folder, tiny_corpus.train, "store.threads=1"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3"])
def test_such_states_in_a_store_of_an_earlier_version_are_found(dtype, tmp_path, bad_target, tiny_corpus, monkeypatch):
    def none_found(batch, output, embed_TD):
        faults = find_faults(batch, output, embed_TD)
        return StateFaults(torch.zeros_like(faults.by_place), torch.zeros_like(faults.left_out_T))

    with monkeypatch.context() as patch:
        patch.setattr("engine.hidden_states.store_writer.find_faults", none_found)
        config = capture_config(tmp_path / "store", bad_target, tiny_corpus.train, f"store.dtype={dtype}")
        run_capture(config)
    expected = bad_documents(tmp_path / "store")
    problems = "\n".join(check_store(tmp_path / "store").problems)
    assert all(f" {index} (aux" in problems for index in expected) and "run the capture again" in problems
    opened = open_store(tmp_path / "store", skip_bad=False)
    ids = tuple(range(40))
    batch = replace(collate([opened.documents[index] for index in ids]), document_ids=ids)
    output = StoredTarget(opened, CPU)(batch, slots_of(allowed_rows(batch, config.ttt)))
    faults = find_faults(batch, output, embed_TD=None)
    assert faults.by_place.any(1).nonzero().flatten().tolist() == expected, "training leaves them out"
