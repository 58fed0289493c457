"""Attention over packed documents in any Transformers model; each document attends only to itself.

Transformers asks a registered mask function for the mask of each kind of layer and passes that mask
to a registered attention function. The mask functions of this engine (`masks.py`) keep every query
inside its document. Windows and chunks are still those of the model family, counted from the start
of the document.

Llama 4 scales the queries of layers without rotary embeddings by their position in the row. For a
packed row this scaling is disabled in the modules, and the attention function scales by the
position in the document instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from engine.kernels import choose_packed_attention
from engine.kernels.packed_attention import Scores, under_mask
from engine.target.masks import DocumentMasks, added, document_masks, whole_masks
from engine.target.packed_row import PackedRow, row_of_forward

NAME = "document_by_document"
ONE = "one_document"

# Arguments that repeat information of the mask, or that only other attention implementations use.
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
_tuned: ContextVar[frozenset[nn.Module]] = ContextVar("modules whose queries are scaled here", default=frozenset())


@contextmanager
def packed_attention(decoder: PreTrainedModel, row: PackedRow, packs: bool = True) -> Iterator[None]:
    """Context manager in which forwards of `decoder` on `row` attend document by document.

    packs: True if modules take all documents at once; False if their wrappers run them on one
    document after another.
    The previous attention implementation is restored on exit, so ordinary forwards with a cache
    stay possible.
    """
    token = row_of_forward.set(row)
    try:
        with attending_with(decoder, NAME if packs else ONE), tuned_here(decoder) if packs else nullcontext():
            yield
    finally:
        row_of_forward.reset(token)


@contextmanager
def attending_with(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Context manager in which `decoder` uses the registered attention function `name`, then the previous one again."""
    configs = _attending_configs(decoder)
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


@contextmanager
def one_document(row: PackedRow) -> Iterator[None]:
    """Context manager in which forwards run one document with the family's own attention."""
    token = row_of_forward.set(row)
    try:
        yield
    finally:
        row_of_forward.reset(token)


_known_configs: WeakKeyDictionary[PreTrainedModel, tuple[PreTrainedConfig, ...]] = WeakKeyDictionary()


def _attending_configs(decoder: PreTrainedModel) -> tuple[PreTrainedConfig, ...]:
    """Return the configs that `decoder.set_attn_implementation` changes.

    That method visits all modules, which takes as long as many kernel launches, so the result is
    cached per decoder.
    """
    if decoder not in _known_configs:
        candidates = [config for module in decoder.modules() for config in _configs_of(module)]
        distinct = {id(config): config for config in candidates}.values()
        before = decoder.config._attn_implementation
        kept = [config._attn_implementation_internal for config in distinct]
        decoder.set_attn_implementation(NAME if before != NAME else ONE)
        after = [config._attn_implementation_internal for config in distinct]
        decoder.set_attn_implementation(before)
        pairs = zip(distinct, kept, after, strict=True)
        _known_configs[decoder] = tuple(config for config, old, new in pairs if old != new)
    return _known_configs[decoder]


def _configs_of(module: nn.Module) -> Iterator[PreTrainedConfig]:
    """Yield the config of a module, if it has one, and all of its sub-configs."""
    config = getattr(module, "config", None)
    waiting = [config] if isinstance(config, PreTrainedConfig) else []
    while waiting:
        config = waiting.pop()
        yield config
        inner = (getattr(config, name, None) for name in config.sub_configs)
        waiting += [one for one in inner if isinstance(one, PreTrainedConfig)]


@contextmanager
def tuned_here(decoder: PreTrainedModel) -> Iterator[None]:
    """Context manager in which `attend_documents` scales Llama 4's queries, not the modules."""
    if not getattr(decoder.config, "attn_temperature_tuning", False):
        yield
        return
    with_option: list[Any] = [module for module in decoder.modules() if hasattr(module, "attn_temperature_tuning")]
    before = {module: module.attn_temperature_tuning for module in with_option}
    token = _tuned.set(_tuned.get() | {module for module, is_tuned in before.items() if is_tuned and not module.use_rope})
    for module in with_option:
        module.attn_temperature_tuning = False
    try:
        yield
    finally:
        for module, is_tuned in before.items():
            module.attn_temperature_tuning = is_tuned
        _tuned.reset(token)


def tuned_queries(module: Any, query_1HTE: Tensor, position_T: Tensor) -> Tensor:
    """Return queries scaled by their position if `tuned_here` has disabled the module's own scaling.

    As in Llama 4, the factor is 1 + attn_scale * log(1 + floor((position + 1) / floor_scale)).
    """
    if module not in _tuned.get():
        return query_1HTE
    steps_T = ((position_T + 1).float() / module.floor_scale).floor()
    return (query_1HTE * (steps_T.log1p() * module.attn_scale + 1)[:, None]).to(query_1HTE.dtype)


def attend_one(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **others
) -> tuple[Tensor, None]:
    """Compute the attention of one document of L tokens; Transformers calls it for `ONE`.

    query, key, value, scaling, softcap and s_aux are as in `attend_documents`.
    attention_mask: the mask that the family derives from `WholeMasks`, [1, 1 or H, L, K]. It is
    bool, or it is added to the scores. K exceeds L if compressed keys follow those of the tokens.
    Further arguments, all optional:
    position_bias: added to the scores as well.
    indices: [1, L, *], the keys that an indexer lets each query read.
    block_indices: [1, G, L, *], the blocks of keys that an indexer lets each query read; -1 = none.
    Raises ValueError if a family passes an argument that would change the result.
    """
    mask_HLK = attention_mask[0, ..., -key.shape[2] :]
    mask_HLK = added(mask_HLK, query.dtype) if mask_HLK.dtype == torch.bool else mask_HLK
    chosen_1LN, blocks, bias = (others.pop(name, None) for name in ("indices", "block_indices", "position_bias"))
    if bias is not None:
        mask_HLK = mask_HLK + bias[0]
    if chosen_1LN is not None:
        allowed_1LK = torch.zeros_like(mask_HLK[:1], dtype=torch.bool).scatter(-1, chosen_1LN.long(), True)
        mask_HLK = mask_HLK + added(allowed_1LK, mask_HLK.dtype)
    if blocks is not None:
        allowed_GLK = _in_blocks(blocks[0], module.indexer.block_size, key.shape[2])
        allowed_HLK = allowed_GLK.repeat_interleave(query.shape[1] // len(allowed_GLK), dim=0)
        mask_HLK = mask_HLK + added(allowed_HLK, mask_HLK.dtype)
    check_known(module, others)
    scores = Scores.of(query, scaling, softcap, s_aux)
    attended_HLF = under_mask(query[0], key[0], value[0], mask_HLK.to(query.dtype), scores)
    return attended_HLF.transpose(0, 1)[None].contiguous(), None


def _in_blocks(chosen_GLN: Tensor, size: int, num_keys: int) -> Tensor:
    """Return whether each key is in a chosen block of `size` keys, bool [G, L, K]; -1 = none."""
    count = -(-num_keys // size)
    named_GLB = chosen_GLN.new_zeros((*chosen_GLN.shape[:2], count + 1), dtype=torch.bool)
    named_GLB.scatter_(-1, chosen_GLN.masked_fill(chosen_GLN < 0, count), True)
    return named_GLB[..., :count].repeat_interleave(size, dim=-1)[..., :num_keys]


def attend_documents(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **others
) -> tuple[Tensor, None]:
    """Compute the attention of the documents of a packed row; Transformers calls it for `NAME`.

    Shapes: query [1, H, T, E], key and value [1, G, T, E] -> [1, T, H, E].
    scaling: factor of the scores; None = E**-0.5. softcap: soft cap of the scores.
    s_aux: [H] sink logits.
    Raises ValueError if a family passes its own mask or an argument that would change the result.
    """
    check_known(module, others)
    if not isinstance(attention_mask, DocumentMasks):
        raise _unknown(module, f"a mask of type {type(attention_mask).__name__}")
    query = tuned_queries(module, query, attention_mask.position_T)
    scores = Scores.of(query, scaling, softcap, s_aux)
    return _attend(query[0], key[0], value[0], attention_mask, scores)[None].contiguous(), None


def check_known(module, others: dict) -> None:
    """Raise ValueError if a family passes attention an argument that would change the result."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _IGNORED)
    if unknown:
        raise _unknown(module, unknown)


def _unknown(module, what) -> ValueError:
    return ValueError(
        f"{type(module).__name__} calls attention with {what}, which is not supported "
        "for packed documents; see `runs_packed` in engine/models/target_families.py"
    )


def _attend(query_HTE: Tensor, key_GTE: Tensor, value_GTF: Tensor, masks: DocumentMasks, scores: Scores) -> Tensor:
    """Return the attention of all documents of a row, [T, H, F]."""
    segments = masks.segments
    if segments is not None:
        attention = choose_packed_attention(query_HTE.device, query_HTE.dtype)
        return attention(query_HTE, key_GTE, value_GTF, segments, scores)
    queries, keys, values = (x.split(masks.lengths, dim=1) for x in (query_HTE, key_GTE, value_GTF))
    documents = zip(queries, keys, values, masks.squares, strict=True)
    attended = [under_mask(query, key, value, square, scores) for query, key, value, square in documents]
    return torch.cat(attended, dim=1).transpose(0, 1)


AttentionInterface.register(NAME, attend_documents)
AttentionMaskInterface.register(NAME, document_masks)
AttentionInterface.register(ONE, attend_one)
AttentionMaskInterface.register(ONE, whole_masks)
