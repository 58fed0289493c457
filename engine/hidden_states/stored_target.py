"""A target that is not loaded: its hidden states, embedding and head are read from a store."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from engine.batch import PackedBatch, TargetOutput, to_device
from engine.hidden_states.store_format import DTYPES, HEAD, TARGET_FOLDER, StoreError, from_stored
from engine.hidden_states.store_reader import MappedShard, OpenStore
from engine.hidden_states.target_files import check_file
from engine.host.files import write_tensors
from engine.target.embedding import SharedEmbedding, TargetEmbedding
from engine.target.head import TargetHead

READERS = 4


def save_head(path: Path, head: TargetHead, embed_weight_VD: Tensor | None) -> None:
    """Save the head and embedding of a target, which a draft needs in addition to hidden states.

    embed_weight_VD: None = head and embedding are one tensor.
    """
    tensors = {"embed": head.weight_VD} if embed_weight_VD is None else {"embed": embed_weight_VD, "head": head.weight_VD}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V
    facts = {"scale": head.scale, "soft_cap": head.soft_cap, "temperature": head.temperature}
    # A single entry, since safetensors writes several entries in no fixed order.
    metadata = {"head": json.dumps(facts)}
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, on_host, metadata)


@dataclass(frozen=True)
class _Part:
    """A document of a batch, and its location in the store.

    own: its index in the shard. tokens, slots: its rows in the batch.
    rows: indices of the wanted slots among its stored slots.
    """

    shard: MappedShard
    own: int
    tokens: slice
    slots: slice
    rows: np.ndarray


class StoredTarget:
    """A captured target, which reads hidden states from a store.

    Of its weights, only the embedding is loaded.
    documents: documents of the store. aux_layers: layers that were captured.
    """

    def __init__(self, store: OpenStore, device: torch.device) -> None:
        """Load the embedding. Raises StoreError if the file of embedding and head is missing or was altered."""
        self.documents = store.documents
        self.aux_layers = store.contents.aux_layers
        self._dtype = DTYPES[store.contents.dtype]
        self._device = device
        self._pins = device.type == "cuda"
        self._head_path = store.folder / TARGET_FOLDER / HEAD
        self._verified: set[tuple[Path, int]] = set()
        check_file(store.folder, HEAD, store.target_files)
        with safe_open(self._head_path, "pt", device=str(device)) as file:
            self.embedding: TargetEmbedding | SharedEmbedding = TargetEmbedding(file.get_tensor("embed"))
        self.dtype = self.embedding.weight_VD.dtype
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        """Return the head restricted to `target_ids_U`, on the device; the rest stays on disk."""
        ids_U = target_ids_U.cpu()
        with safe_open(self._head_path, "pt") as file:
            facts = json.loads(file.metadata()["head"])
            names = set(file.keys())
            weight_UD = file.get_tensor("head" if "head" in names else "embed")[ids_U].to(self._device)
            bias_U = file.get_tensor("bias")[ids_U].to(self._device) if "bias" in names else None
        return TargetHead(weight_UD, bias_V=bias_U, **facts)

    def __call__(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput:
        """Return the captured output of the target for the documents of `batch`.

        slots_N: int64 [N], on the host, ascending.
        Raises StoreError if a document was altered or captured without one of these slots.
        """
        on_host = self.read(batch, slots_N)
        moved = {name: to_device(tensor, self._device) for name, tensor in on_host.items()}
        aux = moved["aux"].view(self._dtype)
        last_hidden = moved["last_hidden"].view(self._dtype)
        return TargetOutput(
            aux_TA=from_stored(aux, moved.get("aux_scale")),
            slots_N=to_device(slots_N, self._device),
            last_hidden_ND=from_stored(last_hidden, moved.get("last_hidden_scale")),
            argmax_N=moved["argmax"],
            lse_N=moved["lse"],
        )

    def read(self, batch: PackedBatch, slots_N: Tensor) -> dict[str, Tensor]:
        """Read a batch's states to the host in the format of the store.

        They are in pinned memory if the device is a GPU. Formats that numpy does not know are
        returned as bytes. Scales are included only if the store has them.
        """
        parts = self._parts(batch, slots_N.numpy())
        for part in parts:
            part.shard.will_need(part.own)
        by_token = self._empty(parts[0].shard, ("aux", "aux_scale"), batch.num_tokens)
        by_slot = self._empty(parts[0].shard, ("last_hidden", "last_hidden_scale", "argmax", "lse"), len(slots_N))
        list(self._threads.map(partial(self._read, by_token=by_token, by_slot=by_slot), parts))
        return by_token | by_slot

    def _parts(self, batch: PackedBatch, slots_N: np.ndarray) -> list[_Part]:
        """Find each document of a batch in the store. Raises StoreError if a slot is missing."""
        parts: list[_Part] = []
        start = 0
        for document, length in zip(batch.document_ids, batch.host_lengths, strict=True):
            shard, own = self.documents.find(document)
            first, end = np.searchsorted(slots_N, (start, start + length))
            stored = shard.slots(own)
            wanted = slots_N[first:end] - start
            rows = np.searchsorted(stored, wanted)
            if len(wanted) and (rows[-1] >= len(stored) or (stored[rows] != wanted).any()):
                raise StoreError(f"{shard.path}: document {document} was captured without all of the slots that it now has")
            parts.append(_Part(shard, own, slice(start, start + length), slice(int(first), int(end)), rows))
            start += length
        return parts

    def _empty(self, shard: MappedShard, names: Sequence[str], num_rows: int) -> dict[str, Tensor]:
        """Allocate host tensors of `num_rows` rows for those of `names` that the store has."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name in shard.layout.places:
                like = torch.from_numpy(shard.rows(name, 0, 0).copy())
                shape = (num_rows, *like.shape[1:])
                # Pinned from the start: bytes from disk are copied once, and the GPU fetches them.
                tensors[name] = torch.empty(shape, dtype=like.dtype, pin_memory=self._pins)
        return tensors

    def _read(self, part: _Part, by_token: Mapping[str, Tensor], by_slot: Mapping[str, Tensor]) -> None:
        """Copy a document's states to its rows of the batch's tensors.

        The checksum of a document is verified when it is read for the first time.
        """
        shard = part.shard
        own = part.own
        if (shard.path, own) not in self._verified:
            shard.verify(own)
            self._verified.add((shard.path, own))
        for name, tensor in by_token.items():
            tensor[part.tokens].numpy()[:] = shard.rows(name, *shard.span(name, own))
        for name, tensor in by_slot.items():
            stored = shard.rows(name, *shard.span(name, own))
            is_all = len(part.rows) == len(stored)
            tensor[part.slots].numpy()[:] = stored if is_all else stored[part.rows]
