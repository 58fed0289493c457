"""Verification of stores byte by byte, and merging of several stores."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from engine.hidden_states.store_format import MANIFEST, SUFFIX, TARGET_FOLDER, Manifest, Shard, StoreError
from engine.hidden_states.store_reader import MappedShard
from engine.hidden_states.target_files import names_of_files, problems_of_files
from engine.host.files import PARTIAL, sync, write_text, writing

MAX_NAMED = 10  # documents that are named per shard
OnProgress = Callable[[int], None]


@dataclass(frozen=True)
class StoreCheck:
    """The result of checking a store.

    problems: one line per bad shard, and per missing or altered file of the target.
    unrecorded: files of the target whose checksum the manifest does not have.
    missing: number of shards that the capture has not written yet.
    seen: number of shards of which every byte was read and found correct.
    """

    manifest: Manifest
    problems: tuple[str, ...]
    missing: int
    seen: int
    unrecorded: tuple[str, ...] = ()


def check_store(folder: Path, on_progress: OnProgress = lambda num_bytes: None) -> StoreCheck:
    """Read and verify every byte of a store.

    on_progress: called with the number of bytes read so far.
    Raises StoreError if the manifest cannot be read.
    """
    manifest = Manifest.read(folder)
    problems: list[str] = []
    missing = 0
    done = 0
    for shard in manifest.shards:
        if shard.checksum is None and not (folder / shard.name).exists():
            missing += 1
            continue
        try:
            mapped = MappedShard(folder, manifest.contents, shard)
            for document in range(shard.num_documents):
                mapped.verify(document)
            _check_finite(mapped)
            done += mapped.layout.num_bytes
            on_progress(done)
        except StoreError as error:
            problems.append(str(error))
    seen = len(manifest.shards) - missing - len(problems)
    of_target = problems_of_files(folder, manifest.target_files)
    unrecorded = [name for name in names_of_files(folder) if name not in manifest.target_files]
    return StoreCheck(manifest, (*problems, *of_target), missing, seen, tuple(unrecorded))


def _check_finite(mapped: MappedShard) -> None:
    """Raise StoreError, naming the documents, if a shard holds states that are not finite."""
    shard = mapped.shard
    found = {index: name for index in range(shard.num_documents) if (name := mapped.non_finite(index)) is not None}
    if found:
        named = ", ".join(f"{shard.first_document + index} ({name})" for index, name in list(found.items())[:MAX_NAMED])
        more = ", ..." if len(found) > MAX_NAMED else ""
        raise StoreError(
            f"{mapped.path}: {len(found)} documents hold NaN or infinity: {named}{more}. Training leaves them out and names "
            "them; delete the shard and run the capture again for a store without them"
        )


@dataclass(frozen=True)
class Merge:
    """The result of merging stores.

    doubled_shards: number of shards left out because an earlier store has the same shard.
    doubled_documents: number of further copies of documents that the merged store holds more than
    once.
    """

    manifest: Manifest
    doubled_shards: int
    doubled_documents: int


def merge_stores(folders: Sequence[Path], into: Path) -> Merge:
    """Merge the shards of several stores into a new store; the given stores do not change.

    Shards are hard-linked, or copied if they are on another disk.
    The target's files are those of the first store.
    Raises StoreError, before anything is written, if `into` exists, if a capture is not complete,
    if the contents of the stores differ, or if a file of the first store's target is missing or was
    altered.
    """
    if into.exists():
        raise StoreError(f"{into} exists; name a folder that does not")
    manifests = [Manifest.read(folder) for folder in folders]
    identities = [manifest.contents.target_identity for manifest in manifests]
    # Each store is compared with the first that knows its target's identity. Stores that know
    # different identities are therefore never merged.
    first_known = next((place for place, identity in enumerate(identities) if identity is not None), 0)
    expected = manifests[first_known].contents
    for folder, manifest in zip(folders, manifests, strict=True):
        differences = manifest.contents.differences(expected)
        if differences:
            problem = f"{folder} differs from {folders[first_known]} in {'; '.join(differences)}"
            raise StoreError(f"{problem}; only stores of the same contents can be merged")
        if not manifest.is_complete:
            raise StoreError(f"{folder}: the capture is not complete; run it again to continue it, then merge")
    of_target = problems_of_files(folders[0], manifests[0].target_files)
    if of_target:
        raise StoreError(of_target[0])
    chosen: list[tuple[MappedShard, Shard]] = []
    checksums: set[str] = set()
    documents: dict[int, int] = {}
    first = 0
    for folder, manifest in zip(folders, manifests, strict=True):
        for shard in manifest.shards:
            mapped = MappedShard(folder, manifest.contents, shard)
            if mapped.checksum in checksums:
                continue
            checksums.add(mapped.checksum)
            chosen.append((mapped, replace(shard, name=f"shard-{len(chosen):05d}{SUFFIX}", first_document=first)))
            first += shard.num_documents
            for digest in map(_content, map(mapped.document, range(shard.num_documents))):
                documents[digest] = documents.get(digest, 0) + 1
    corpus = xxhash.xxh3_64("".join(manifest.corpus_checksum for manifest in manifests).encode()).hexdigest()
    contents = expected if None not in identities else replace(expected, target_identity=None)
    merged = Manifest(contents, corpus, tuple(shard for _, shard in chosen), manifests[0].target_files)
    _write_merged(folders[0], chosen, merged, into)
    doubled_shards = sum(len(manifest.shards) for manifest in manifests) - len(chosen)
    return Merge(merged, doubled_shards, sum(count - 1 for count in documents.values()))


def _content(document) -> int:
    return xxhash.xxh3_64_intdigest(document.assistant_mask.tobytes(), xxhash.xxh3_64_intdigest(document.input_ids.tobytes()))


def _write_merged(first: Path, chosen: list[tuple[MappedShard, Shard]], merged: Manifest, into: Path) -> None:
    partial = into.with_name(f"{into.name}{PARTIAL}")
    with writing(into):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(first / TARGET_FOLDER, partial / TARGET_FOLDER, copy_function=shutil.copyfile)
        for mapped, shard in chosen:
            try:
                os.link(mapped.path, partial / shard.name)
            except OSError:
                shutil.copyfile(mapped.path, partial / shard.name)
        write_text(partial / MANIFEST, merged.to_json())
        os.replace(partial, into)
        sync(into.parent)
