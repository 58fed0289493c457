"""Documents laid end to end in packs of at most `max_tokens` tokens."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch

from engine.batch import PackedBatch
from engine.data.chat import Document

OPEN_PACKS = 512


def pack(lengths: Sequence[int], max_tokens: int, order: Sequence[int]) -> list[list[int]]:
    """Packs of document indices, each of at most `max_tokens` tokens; every index of `order` lands in exactly one.

    Best fit over the `OPEN_PACKS` emptiest packs: a document joins the open pack it fills best, or opens a new one.
    Packs come in the order they were opened. Raises ValueError if a document is longer than a pack.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack) of the open packs, ascending
    for document in order:
        length = int(lengths[document])
        if length > max_tokens:
            raise ValueError(f"document {document} has {length} tokens, a pack holds {max_tokens}; cut or split it first")
        best = bisect_left(room, (length, -1))
        if best < len(room):
            free, index = room.pop(best)
            packs[index].append(int(document))
        else:
            free, index = max_tokens, len(packs)
            packs.append([int(document)])
        insort(room, (free - length, index))
        if len(room) > OPEN_PACKS:
            room.pop(0)
    return packs


def collate(documents: Sequence[Document], document_ids: Sequence[int] = ()) -> PackedBatch:
    """One batch of whole documents, in the order given. document_ids: as in it. Raises ValueError if there are none."""
    if not documents:
        raise ValueError("a batch needs at least one document, got none")
    lengths = [len(document) for document in documents]
    return PackedBatch(
        input_ids_T=torch.from_numpy(np.concatenate([document.input_ids for document in documents]).astype(np.int64)),
        assistant_mask_T=torch.from_numpy(np.concatenate([document.assistant_mask for document in documents])),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        document_ids=tuple(document_ids),
    )
