"""The format of a store: shards of whole documents in safetensors, and a manifest of its contents.

A shard holds the tokens of its documents with their auxiliary hidden states, end to end and without
padding. It also holds the slots of its documents, which are the positions at which the target
distribution is learned, with the last hidden state, argmax and log-sum-exp at each slot. Every size
follows from the lengths and masks of the documents. The size of a store, and the place of
everything in a shard, are therefore known before the first byte is written.

Shapes: T tokens, N slots, n documents of a shard; A auxiliary layers of D features each.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import xxhash

from engine.host.files import is_plain_name

MANIFEST = "manifest.json"
TARGET_FOLDER = "target"
HEAD = "head.safetensors"  # in TARGET_FOLDER
VERSION = 1
SUFFIX = ".safetensors"
NO_CHECKSUM = "0" * 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn}
# Tensors with one row per slot. The others, except those of OF_SHARD, have one row per token.
BY_SLOT = {"slots", "argmax", "lse", "last_hidden", "last_hidden_scale"}
OF_SHARD = ("checksums", "token_bounds", "slot_bounds")  # entries per document
SAFETENSORS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bool: "BOOL",
}


class StoreError(ValueError):
    """A store that cannot be written, continued or read; the message names the file and the fix."""


@dataclass(frozen=True)
class Contents:
    """Description of what was captured in a store.

    A capture can be continued, and stores can be merged, only if `differences` finds none.

    target, revision: the target as named in the recipe.
    config_hash, tokenizer_hash, template_hash: hashes of what determines the hidden states.
    aux_layers, mask_alignment, temperature: as in the recipe.
    dtype: format of the hidden states in the shards.
    fp8_activations: as in the recipe. Manifests written before this option existed lack it.
    target_identity: hashes of the target's published config and of its weights. None in manifests
    written before it was recorded.
    """

    target: str
    revision: str | None
    config_hash: str
    tokenizer_hash: str
    template_hash: str
    aux_layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    mask_alignment: str
    temperature: float
    dtype: str
    fp8_activations: bool = False
    target_identity: str | None = None

    def differences(self, other: "Contents") -> list[str]:
        """Return the fields in which `other` differs, each as `name: theirs, now ours`.

        The path of the target is not compared. The identity is compared only if both know it.
        """
        skipped = {"target"}
        if None in (self.target_identity, other.target_identity):
            skipped.add("target_identity")
        compared = [f.name for f in fields(self) if f.name not in skipped]
        differing = [name for name in compared if getattr(other, name) != getattr(self, name)]
        found = [f"{name}: {getattr(other, name)!r}, now {getattr(self, name)!r}" for name in differing]
        if "target_identity" in differing:
            found.append("so the target's weights or its config.json are not those of the existing shards")
        return found

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token, without those of its slot: id, mask, auxiliary states."""
        return 4 + 1 + len(self.aux_layers) * self._bytes_per_state

    @property
    def bytes_per_slot(self) -> int:
        """Additional bytes per slot: position, argmax, log-sum-exp, last hidden state."""
        return 4 + 4 + 4 + self._bytes_per_state

    @property
    def _bytes_per_state(self) -> int:
        scale = 4 if self.dtype == "float8_e4m3" else 0
        return self.hidden_size * DTYPES[self.dtype].itemsize + scale


@dataclass(frozen=True)
class Shard:
    """A file of the store, which holds consecutive documents of the corpus.

    first_document: index in the corpus of its first document.
    checksum: hash of its documents' checksums, 16 hexadecimal digits; None until it is written.
    left_out: indices within the shard, from 0, of documents that were left out because the target's
    states were not finite.
    """

    name: str
    first_document: int
    num_documents: int
    num_tokens: int
    num_slots: int
    checksum: str | None = None
    left_out: tuple[int, ...] = ()

    @property
    def documents(self) -> range:
        return range(self.first_document, self.first_document + self.num_documents)


@dataclass(frozen=True)
class Manifest:
    """The manifest of a store.

    corpus_checksum: checksum of all token ids and masks, in order.
    target_files: SHA-256 of each file of TARGET_FOLDER, by its path in it. Manifests written before
    these were recorded lack them.
    """

    contents: Contents
    corpus_checksum: str
    shards: tuple[Shard, ...]
    target_files: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return all(shard.checksum is not None for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_left_out(self) -> int:
        """Number of documents that were left out and from which nothing is learned."""
        return sum(len(shard.left_out) for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(Layout.of(self.contents, shard).num_bytes for shard in self.shards)

    def to_json(self) -> str:
        values = {
            "format": "draftspeed hidden states",
            "version": VERSION,
            "corpus_checksum": self.corpus_checksum,
            "contents": asdict(self.contents),
            "target_files": dict(self.target_files),
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a store. Raises StoreError if it is missing, cut off or invalid."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["version"] != VERSION:
                raise StoreError(f"{path} is of version {values['version']}, expected {VERSION}; capture again")
            contents = values["contents"] | {"aux_layers": tuple(values["contents"]["aux_layers"])}
            shards = tuple(_shard(shard) for shard in values["shards"])
            _check_shards(shards, path)
            target_files = values.get("target_files", {})
            _check_target_files(target_files, path)
            return cls(Contents(**contents), values["corpus_checksum"], shards, target_files)
        except FileNotFoundError as error:
            raise StoreError(
                f"{folder} is not a store: it has no {MANIFEST}; write one with launcher/capture_hidden_states.py"
            ) from error
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            problem = f"{path} is not a manifest of a store, or was altered ({type(error).__name__}: {error})"
            raise StoreError(f"{problem}; restore it, or capture again into another folder") from error


def _shard(values: dict[str, Any]) -> Shard:
    """Return a shard from its entry in a manifest; entries of earlier versions lack `left_out`."""
    return Shard(**values | {"left_out": tuple(values.get("left_out", ()))})


def _check_shards(shards: Sequence[Shard], path: Path) -> None:
    """Raise StoreError for a shard outside the store's folder, a shard named twice, or a bad count.

    A count is a whole number of at least 0.
    """
    names = [shard.name for shard in shards]
    for name in names:
        if not is_plain_name(name) or not name.endswith(SUFFIX):
            problem = f"{path} names a shard {name!r}, expected a file such as shard-00000{SUFFIX} in the same folder"
            raise StoreError(f"{problem}; the manifest was altered, so restore it or capture again into another folder")
    for shard in shards:
        counts = (shard.first_document, shard.num_documents, shard.num_tokens, shard.num_slots)
        if any(type(count) is not int or count < 0 for count in counts):
            problem = f"{path} gives {shard.name} the counts {counts}, expected whole numbers of at least 0"
            raise StoreError(f"{problem}; it was altered, so restore it or capture again into another folder")
    if len(set(names)) < len(names):
        raise StoreError(f"{path} names a shard twice; it was altered, so restore it or capture again into another folder")


def _check_target_files(target_files: Any, path: Path) -> None:
    """Raise StoreError unless these are checksums by the path of a file inside the target's folder."""
    is_mapping = isinstance(target_files, dict)
    names = list(target_files) if is_mapping else []
    is_inside = all(name and all(map(is_plain_name, PurePosixPath(name).parts)) for name in names)
    if not is_mapping or not is_inside or not all(isinstance(target_files[name], str) for name in names):
        problem = f"{path} names files of its target {target_files!r}, expected a SHA-256 for each file of {TARGET_FOLDER}/"
        raise StoreError(f"{problem}; the manifest was altered, so restore it or capture again into another folder")


@dataclass(frozen=True)
class Place:
    """Location of a tensor in a file. offset: of its first byte from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True)
class Layout:
    """Byte layout of a shard's file: a safetensors header and the tensors.

    The `checksum` in the header is filled in last.
    """

    places: dict[str, Place]
    header_bytes: int
    num_bytes: int

    @classmethod
    def of(cls, contents: Contents, shard: Shard) -> "Layout":
        shapes = _shapes(contents, shard)
        header_bytes = len(_header(shapes, NO_CHECKSUM))
        offset = 0
        places = {}
        for name, (dtype, shape) in shapes.items():
            places[name] = Place(dtype, shape, header_bytes + offset)
            offset += places[name].num_bytes
        return cls(places, header_bytes, header_bytes + offset)

    def header(self, checksum: str) -> bytes:
        return _header({name: (place.dtype, place.shape) for name, place in self.places.items()}, checksum)


def _shapes(contents: Contents, shard: Shard) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return types and shapes in file order; wide elements come first, so that all are aligned."""
    num_documents = shard.num_documents
    num_tokens = shard.num_tokens
    num_slots = shard.num_slots
    size = contents.hidden_size
    num_aux = len(contents.aux_layers)
    dtype = DTYPES[contents.dtype]
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "token_bounds": (torch.int64, (num_documents + 1,)),
        "slot_bounds": (torch.int64, (num_documents + 1,)),
        "checksums": (torch.int64, (num_documents,)),
        "input_ids": (torch.int32, (num_tokens,)),
        "slots": (torch.int32, (num_slots,)),
        "argmax": (torch.int32, (num_slots,)),
        "lse": (torch.float32, (num_slots,)),
    }
    if contents.dtype == "float8_e4m3":
        shapes |= {"aux_scale": (torch.float32, (num_tokens, num_aux)), "last_hidden_scale": (torch.float32, (num_slots, 1))}
    return shapes | {
        "aux": (dtype, (num_tokens, num_aux * size)),
        "last_hidden": (dtype, (num_slots, size)),
        "assistant_mask": (torch.bool, (num_tokens,)),
    }


def _header(shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], checksum: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "checksum": checksum}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def plan_shards(num_tokens: Sequence[int], num_slots: Sequence[int], contents: Contents, shard_bytes: int) -> tuple[Shard, ...]:
    """Divide consecutive documents into shards.

    num_tokens, num_slots: counts of each document.
    shard_bytes: largest size of a shard, unless it holds a single document.
    """

    def cut() -> Iterator[tuple[int, int, int, int]]:
        first = tokens = slots = 0
        for document, (more_tokens, more_slots) in enumerate(zip(num_tokens, num_slots, strict=True)):
            size = (tokens + more_tokens) * contents.bytes_per_token + (slots + more_slots) * contents.bytes_per_slot
            if document > first and size > shard_bytes:
                yield first, document - first, tokens, slots
                first = document
                tokens = 0
                slots = 0
            tokens = tokens + more_tokens
            slots = slots + more_slots
        yield first, len(num_tokens) - first, tokens, slots

    return tuple(Shard(f"shard-{index:05d}{SUFFIX}", *sizes) for index, sizes in enumerate(cut()))


def document_checksum(parts: Sequence[np.ndarray]) -> int:
    """Return the checksum of a document as a signed 64-bit integer.

    parts: the document's rows of every tensor, in file order.
    """
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return int(np.uint64(digest.intdigest()).astype(np.int64))


def to_stored(states: torch.Tensor, dtype: str, num_scales: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convert hidden states [rows, features] to the format `dtype` of a shard.

    Returns the stored states, and for fp8 the scales, fp32 [rows, num_scales], one for each of
    `num_scales` equal parts of a row. For other formats the scales are None.
    In fp8 the largest magnitude of a part becomes 448, the largest number of the format.
    """
    if dtype != "float8_e4m3":
        return states.to(DTYPES[dtype]), None
    parts = states.float().unflatten(1, (num_scales, -1))
    scale = parts.abs().amax(-1).clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (parts / scale[..., None]).to(torch.float8_e4m3fn).flatten(1), scale


def from_stored(stored: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Restore hidden states from the output of `to_stored`; fp8 states become bf16."""
    if scale is None:
        return stored
    return (stored.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1).bfloat16()
