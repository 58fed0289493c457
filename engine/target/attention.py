"""Attention of packed documents inside any Transformers model: each document sees itself alone.

Transformers asks a registered mask function for the mask of each kind of layer, then hands it to a registered attention
function. Ours keeps one mask a document, so windows and chunks are exactly the family's own, counted from the document's start.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from engine.parallel.tokens import ByDocument

NAME, ONE = "document_by_document", "one_document"
_MAX_SCORES = 1 << 26
_lengths: ContextVar[tuple[int, ...]] = ContextVar("lengths of the packed documents")

# Arguments that say what the mask says already, or that matter to other implementations only.
_IGNORED = {
    "dropout",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "sliding_window",
    "use_cache",
}


@dataclass(frozen=True)
class DocumentMasks(ByDocument):
    """lengths: of the documents. allowed_LL: a mask for each, bool [L, L], true where a query (row) may read a key (column);
    None = plainly causal.
    """

    lengths: tuple[int, ...]
    allowed_LL: tuple[Tensor | None, ...]

    def of(self, documents: Sequence[int]) -> "DocumentMasks":
        return DocumentMasks(*(tuple(facts[index] for index in documents) for facts in (self.lengths, self.allowed_LL)))


@dataclass(frozen=True)
class WholeMasks(ByDocument):
    """The same masks as tensors [1, 1, L, L], for modules that are run on one document and make more of them (indexers)."""

    masks: DocumentMasks
    device: torch.device

    def of(self, documents: Sequence[int]) -> "WholeMasks | Tensor":
        masks = self.masks.of(documents)
        if len(documents) != 1:
            return WholeMasks(masks, self.device)
        (length,), (allowed_LL,) = masks.lengths, masks.allowed_LL
        if allowed_LL is None:
            allowed_LL = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        return allowed_LL[None, None]


@contextmanager
def packed_attention(decoder: PreTrainedModel, lengths: tuple[int, ...], packs: bool = True) -> Iterator[None]:
    """Within it, forwards of `decoder` on one row of `sum(lengths)` tokens attend document by document.

    packs: whether modules take all documents at once, or are run on one after the other by whoever wrapped them.
    The attention implementation of before is restored on the way out, so ordinary forwards with a cache stay possible.
    """
    before = decoder.config._attn_implementation
    token = _lengths.set(lengths)
    decoder.set_attn_implementation(NAME if packs else ONE)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
        _lengths.reset(token)


def document_masks(*, q_length: int, mask_function, device: torch.device, **_) -> DocumentMasks:
    """Evaluate a layer's mask rule on each document's own square of the packed row.

    q_length: tokens of that row, or, where ranks run the target together, this rank's part of it.
    """
    lengths = _lengths.get()
    assert sum(lengths) >= q_length, f"documents hold {sum(lengths)} tokens, the row {q_length}"
    first = torch.zeros((), dtype=torch.int64, device=device)
    masks, differs, start = [], [], 0
    for length in lengths:
        position_L = torch.arange(start, start + length, device=device)
        allowed_LL = mask_function(first, first, position_L[:, None], position_L[None, :]).expand(length, length)
        causal_LL = position_L[:, None] >= position_L[None, :]
        masks.append(allowed_LL)
        differs.append((allowed_LL != causal_LL).any())
        start += length
    pairs = zip(masks, torch.stack(differs).tolist(), strict=True)  # the device is waited for once
    return DocumentMasks(lengths, tuple(allowed_LL if differs else None for allowed_LL, differs in pairs))


def whole_masks(*, device: torch.device, **arguments) -> WholeMasks:
    """`document_masks`, as tensors once a document is taken out."""
    return WholeMasks(document_masks(device=device, **arguments), device)


def attend_one(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **others
) -> tuple[Tensor, None]:
    """`attend_documents` for one document, with a mask of its family's own making: bool, or added to the scores."""
    allowed = (
        attention_mask if attention_mask.dtype == torch.bool else attention_mask > torch.finfo(attention_mask.dtype).min / 2
    )
    chosen_1LK, length = others.pop("indices", None), query.shape[2]
    if chosen_1LK is not None:  # the keys that an indexer lets each query read
        allowed = allowed & torch.zeros_like(allowed).scatter(-1, chosen_1LK[:, None].long(), True)
    masks = DocumentMasks((length,), (allowed[0, 0, :, -length:],)) if allowed.shape[1] == 1 else None
    if masks is None:
        raise ValueError(f"{type(module).__name__} attends under a mask a head, which is not known here")
    return attend_documents(module, query, key, value, masks, scaling, softcap, s_aux, **others)


def attend_documents(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **others
) -> tuple[Tensor, None]:
    """The attention function Transformers calls: query [1, H, T, E], key and value [1, G, T, E] -> [1, T, H, E].

    scaling: factor of the scores; None = E**-0.5. softcap: cap of the scores. s_aux: [H] sink logits.
    Raises ValueError where a family hands over a mask of its own or an argument that would change the result.
    """
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _IGNORED)
    if unknown or not isinstance(attention_mask, DocumentMasks):
        what = unknown or f"a mask of type {type(attention_mask).__name__}"
        raise ValueError(
            f"{type(module).__name__} attends with {what}, which packed documents cannot; see registry.runs_packed"
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    split = (x[0].split(attention_mask.lengths, dim=1) for x in (query, key, value))
    documents = zip(*split, attention_mask.allowed_LL, strict=True)
    attended = [_attend(q, k, v, allowed_LL, scale, softcap, s_aux) for q, k, v, allowed_LL in documents]
    return torch.cat(attended, dim=1).transpose(0, 1)[None].contiguous(), None


def _attend(query_HLE, key_HLE, value_HLE, allowed_LL, scale, softcap, sinks_H) -> Tensor:
    if softcap is None and sinks_H is None:
        attended = F.scaled_dot_product_attention(
            query_HLE[None], key_HLE[None], value_HLE[None], attn_mask=allowed_LL, is_causal=allowed_LL is None, scale=scale
        )
        return attended[0]
    heads, length, _ = query_HLE.shape
    if allowed_LL is None:
        allowed_LL = torch.ones(length, length, dtype=torch.bool, device=query_HLE.device).tril()
    rows = max(1, _MAX_SCORES // (heads * length))
    chunks = zip(query_HLE.split(rows, dim=1), allowed_LL.split(rows), strict=True)
    return torch.cat([_attend_rows(q, key_HLE, value_HLE, allowed, scale, softcap, sinks_H) for q, allowed in chunks], dim=1)


def _attend_rows(query_HQE, key_HLE, value_HLE, allowed_QL, scale, softcap, sinks_H) -> Tensor:
    scores_HQL = (query_HQE @ key_HLE.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores_HQL = softcap * torch.tanh(scores_HQL / softcap)
    scores_HQL = scores_HQL.masked_fill(~allowed_QL, -torch.inf)
    if sinks_H is not None:
        sinks_HQ1 = sinks_H.float().view(-1, 1, 1).expand(-1, query_HQE.shape[1], 1)
        scores_HQL = torch.cat([scores_HQL, sinks_HQ1], dim=-1)
    weights_HQL = scores_HQL.softmax(dim=-1)[..., : key_HLE.shape[1]]
    return weights_HQL.to(value_HLE.dtype) @ value_HLE


AttentionInterface.register(NAME, attend_documents)
AttentionMaskInterface.register(NAME, document_masks)
AttentionInterface.register(ONE, attend_one)
AttentionMaskInterface.register(ONE, whole_masks)
