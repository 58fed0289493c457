"""The frozen target, met only through what a capture left of it on disk."""

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
from engine.hidden_states.store_format import DTYPES, TARGET_FOLDER, StoreError, from_stored
from engine.hidden_states.store_reader import MappedShard, OpenStore
from engine.host.files import write_tensors
from engine.target.embedding import SharedEmbedding, TargetEmbedding
from engine.target.head import TargetHead

HEAD = "head.safetensors"
READERS = 4


def save_head(path: Path, head: TargetHead, embed_weight_VD: Tensor | None) -> None:
    """What a draft needs of a target beside its hidden states: the head and the embedding; None = they are one tensor."""
    tensors = {"embed": head.weight_VD} if embed_weight_VD is None else {"embed": embed_weight_VD, "head": head.weight_VD}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V
    facts = {"scale": head.scale, "soft_cap": head.soft_cap, "temperature": head.temperature}
    metadata = {"head": json.dumps(facts)}  # one entry: safetensors writes several in no order
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, on_host, metadata)


@dataclass(frozen=True)
class _Part:
    """A document of a batch in the store.

    own: its place in the shard. tokens, slots: its rows in the batch. rows: its wanted slots among those stored.
    """

    shard: MappedShard
    own: int
    tokens: slice
    slots: slice
    rows: np.ndarray


class StoredTarget:
    """A target that was captured: reads a store's hidden states. Of its weights only the embedding is loaded.

    documents: those of the store. aux_layers: as captured.
    """

    def __init__(self, store: OpenStore, device: torch.device) -> None:
        """Raises StoreError if the store lacks the target's embedding and head."""
        self.documents = store.documents
        self.aux_layers = store.contents.aux_layers
        self._dtype = DTYPES[store.contents.dtype]
        self._device = device
        self._pins = device.type == "cuda"
        self._head_path = store.folder / TARGET_FOLDER / HEAD
        self._verified: set[tuple[Path, int]] = set()
        if not self._head_path.is_file():
            raise StoreError(f"{self._head_path} is missing; run the capture again, which writes it")
        with safe_open(self._head_path, "pt", device=str(device)) as file:
            self.embedding: TargetEmbedding | SharedEmbedding = TargetEmbedding(file.get_tensor("embed"))
        self.dtype = self.embedding.weight_VD.dtype
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        """The head restricted to `target_ids_U`, on the device; the rest of it stays on the disk."""
        ids_U = target_ids_U.cpu()
        with safe_open(self._head_path, "pt") as file:
            facts = json.loads(file.metadata()["head"])
            names = set(file.keys())
            weight_UD = file.get_tensor("head" if "head" in names else "embed")[ids_U].to(self._device)
            bias_U = file.get_tensor("bias")[ids_U].to(self._device) if "bias" in names else None
        return TargetHead(weight_UD, bias_V=bias_U, **facts)

    def __call__(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput:
        """What the target made of the documents of `batch`. slots_N: on the host, int64 [N], ascending."""
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
        """Read a batch's states to the host as they are stored, into pinned memory if they go on to a GPU.

        Formats that numpy does not know come as bytes; scales are there only if the store has them.
        """
        parts = self._parts(batch, slots_N.numpy())
        for part in parts:
            part.shard.will_need(part.own)
        by_token = self._empty(parts[0].shard, ("aux", "aux_scale"), batch.num_tokens)
        by_slot = self._empty(parts[0].shard, ("last_hidden", "last_hidden_scale", "argmax", "lse"), len(slots_N))
        list(self._threads.map(partial(self._read, by_token=by_token, by_slot=by_slot), parts))
        return by_token | by_slot

    def _parts(self, batch: PackedBatch, slots_N: np.ndarray) -> list[_Part]:
        """Find each document of a batch in the store."""
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
        """Allocate the tensors of these names that the store has, for `num_rows` rows on the host."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name in shard.layout.places:
                like = torch.from_numpy(shard.rows(name, 0, 0).copy())
                shape = (num_rows, *like.shape[1:])
                # pinned from the start, so that the disk's bytes are copied once and the GPU fetches them by itself
                tensors[name] = torch.empty(shape, dtype=like.dtype, pin_memory=self._pins)
        return tensors

    def _read(self, part: _Part, by_token: Mapping[str, Tensor], by_slot: Mapping[str, Tensor]) -> None:
        """Copy a document's states to its rows of the batch's tensors; its first reader verifies its checksum."""
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
