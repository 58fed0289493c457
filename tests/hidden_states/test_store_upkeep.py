"""A check reads every byte; a merge has every document of its parts once for each shard that differs."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.hidden_states.store_format import MANIFEST, StoreError
from engine.hidden_states.store_reader import open_store
from engine.hidden_states.store_upkeep import check_store, merge_stores
from engine.host.telemetry import Telemetry
from launcher.inspect_store import inspect
from tests.captures import capture_config, run_capture
from tests.distributed import launch


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_target, tiny_corpus) -> tuple[Path, Path]:
    """Captures of the corpus and of its held-out conversations."""
    folder = tmp_path_factory.mktemp("parts")
    for name, conversations in (("train", tiny_corpus.train), ("held_out", tiny_corpus.held_out)):
        run_capture(capture_config(folder / name, tiny_target, conversations))
    return folder / "train", folder / "held_out"


def test_a_whole_store_is_found_whole_and_progress_reaches_its_size(parts):
    seen = []
    check = check_store(parts[0], seen.append)
    assert not check.problems and not check.missing and check.seen == len(check.manifest.shards)
    assert seen[-1] == check.manifest.num_bytes and seen == sorted(seen)


def test_every_harmed_shard_is_named(parts, tmp_path):
    store = shutil.copytree(parts[0], tmp_path / "store")
    first, second, third, *_ = sorted(store.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1] + b"\x07")
    third.write_bytes(b"")
    check = check_store(store)
    assert [path.name in problem for path, problem in zip((first, second, third), check.problems, strict=True)] == [True] * 3
    assert check.seen == len(check.manifest.shards) - 3


def test_altered_missing_and_unrecorded_files_of_the_target_are_named(parts, tmp_path):
    store = shutil.copytree(parts[0], tmp_path / "store")
    head = store / "target" / "head.safetensors"
    data = head.read_bytes()
    head.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (store / "target" / "tokenizer_config.json").unlink()
    (store / "target" / "added.json").write_text("{}")
    check = check_store(store)
    assert check.seen == len(check.manifest.shards) and check.unrecorded == ("added.json",)
    named = ("head.safetensors was altered", "tokenizer_config.json is missing")
    assert [words in problem for words, problem in zip(named, check.problems, strict=True)] == [True] * 2
    with pytest.raises(StoreError, match=r"head\.safetensors was altered"):
        merge_stores([store, parts[1]], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_inspection_says_what_it_could_not_compare(parts, tmp_path, capsys):
    store = shutil.copytree(parts[0], tmp_path / "store")
    manifest = json.loads((store / MANIFEST).read_text())
    del manifest["target_files"]
    (store / MANIFEST).write_text(json.dumps(manifest))
    assert inspect(store, False, Telemetry(speaks=True)) and inspect(store, True, Telemetry(speaks=True))
    shown = capsys.readouterr().out
    assert "without a checksum in the manifest" in shown and "head.safetensors" in shown
    (store / "target" / "head.safetensors").unlink()
    for quick in (False, True):
        assert not inspect(store, quick, Telemetry(speaks=True))
        assert "head.safetensors is missing" in capsys.readouterr().out


def test_a_merged_store_has_all_documents_and_keeps_its_parts(parts, tmp_path):
    merge = merge_stores(parts, tmp_path / "both")
    assert (merge.doubled_shards, merge.doubled_documents) == (0, 0)
    documents = [open_store(folder, skip_bad=False).documents for folder in (*parts, tmp_path / "both")]
    apart = [document.input_ids.tolist() for documents in documents[:2] for document in documents]
    assert [document.input_ids.tolist() for document in documents[2]] == apart
    merged = check_store(tmp_path / "both")
    assert not merged.problems and not merged.unrecorded and not check_store(parts[0]).problems
    again = merge_stores([tmp_path / "both", parts[1]], tmp_path / "again")
    doubled = len(check_store(parts[1]).manifest.shards)
    assert again.doubled_shards == doubled and again.manifest.num_documents == merge.manifest.num_documents


def test_what_does_not_fit_together_is_refused_before_anything_is_written(parts, tmp_path, tiny_target, tiny_corpus):
    run_capture(capture_config(tmp_path / "bf16", tiny_target, tiny_corpus.train, "store.dtype=bfloat16"))
    with pytest.raises(StoreError, match="dtype: 'float32', now 'bfloat16'"):
        merge_stores([parts[0], tmp_path / "bf16"], tmp_path / "both")
    with pytest.raises(StoreError, match="exists"):
        merge_stores(parts, tmp_path / "bf16")
    assert not (tmp_path / "both").exists() and not list(tmp_path.glob("*.partial"))


def renamed(store: Path, folder: Path, identity: str | None) -> Path:
    """A copy of a store that says it is of a target of another identity; None: of none that it names."""
    shutil.copytree(store, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["contents"]["target_identity"] = identity
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_stores_of_other_weights_are_not_merged_even_behind_one_that_names_none(parts, tmp_path):
    old = renamed(parts[0], tmp_path / "old", None)
    other = renamed(parts[1], tmp_path / "other", "of-others")
    for folders in ([parts[0], other], [old, parts[0], other]):
        with pytest.raises(StoreError, match=f"{other} differs from {parts[0]} in target_identity: .*'of-others'"):
            merge_stores(folders, tmp_path / "both")
    assert merge_stores([old, parts[1]], tmp_path / "both").manifest.contents.target_identity is None


def test_the_command_shows_checks_and_merges(parts, tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess:
        return launch(["launcher/inspect_store.py", *map(str, arguments)])

    merged = run(*parts, "--merge_into", tmp_path / "both")
    assert merged.returncode == 0 and "44 documents" in merged.stdout
    shown = run(tmp_path / "both")
    assert shown.returncode == 0 and "every byte as written" in shown.stdout and "(0, 1, 3)" in shown.stdout
    assert "compared with" in shown.stdout and "without a checksum" not in shown.stdout
    shard = sorted((tmp_path / "both").glob("*.safetensors"))[0]
    shard.unlink()
    shard.write_bytes(b"short")
    harmed = run(tmp_path / "both")
    assert harmed.returncode == 1 and shard.name in harmed.stdout
    assert run(tmp_path / "both", "--quick").stderr.startswith("inspect_store.py: ")
