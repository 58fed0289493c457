"""What wraps a module of the target so that its ranks share it: forwards are exchanged, the module knows nothing of it.

Token dimension: the last one of whole numbers [1, T], else the last but one ([1, T, D], [1, T, E]); of what is called with rows
of tokens, as experts are, the first ([T, D], [T, K]).
"""

from collections import UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.parallel.collectives import Finish, start_gathering, start_summing
from engine.parallel.mesh import Group
from engine.parallel.tokens import ByDocument, DocumentChunk, bounds, current_tokens, tokens_of_forward
from engine.parallel.vocab_shard import VocabShard

Change = Callable[[Tensor, int], Any]


def share(module: nn.Module, group: Group, rows: bool = False, parts: int = 1) -> None:
    """A sharded block: all ranks' tokens in at its door, and out of its partial results the sum for own tokens.

    rows: whether it is called with rows of tokens. parts: into how many its documents are divided where they can be: while one
    is computed, the next one's tokens come and the last one's results leave.
    """
    inner = module.forward

    def forward(*args, **kwargs):
        tokens = current_tokens()
        leaving = []
        outputs = []
        pieces = tokens.parts(parts if group.size > 1 else 1)

        def start(part: DocumentChunk) -> Any:
            def gathering(x: Tensor, dim: int) -> _Coming:
                return _Coming(start_gathering(_cut(x, dim, part.own), dim, part.tokens.counts_R, group))

            coming = _changed((args, kwargs), tokens.num_own, gathering, rows=rows)
            if len(pieces) == 1:
                return coming
            return _changed(coming, tokens.num_all, partial(_cut, rows=part.rows), part.documents)

        coming = start(pieces[0])
        for part, following in zip(pieces, (*pieces[1:], None), strict=True):
            own_args, own_kwargs = _each(coming, _arrived)
            coming = following and start(following)
            with tokens_of_forward(part.tokens):
                outputs.append(inner(*own_args, **own_kwargs))
            leaving.append(start_summing(_first_of(outputs[-1]), -2, part.tokens.counts_R, group))
        own = [finish() for finish in leaving]
        first = torch.cat(own, -2) if len(own) > 1 else own[0]
        if isinstance(outputs[0], Tensor):
            return first
        behind = zip(*(output[1:] for output in outputs), strict=True)
        return first, *(_in_order(items, pieces) for items in behind)

    module.forward = forward


def share_rows(embedding: nn.Embedding, group: Group) -> None:
    """A table of which each rank holds `VocabShard`: all ranks' token ids in, own tokens' rows out."""
    inner = embedding.forward
    own = VocabShard(embedding.num_embeddings, group)
    embedding.padding_idx = None  # it matters to gradients alone, and may lie outside of the part

    def forward(input: Tensor) -> Tensor:
        return own.look_up(inner, input, current_tokens().counts_R)

    embedding.forward = forward  # type: ignore[method-assign]  # modules look it up like any other attribute


def keep_own(module: nn.Module) -> None:
    """A replicated block: what comes gathered (positions, rotary embeddings, masks) is cut to own tokens."""
    inner = module.forward

    def forward(*args, **kwargs):
        tokens = current_tokens()
        own = partial(_cut, rows=tokens.own)
        if tokens.num_own < tokens.num_all:
            own_args, own_kwargs = _changed((args, kwargs), tokens.num_all, own, tokens.own_documents)
            return inner(*own_args, **own_kwargs)
        return inner(*args, **kwargs)

    module.forward = forward


def by_document(module: nn.Module, shared: bool) -> None:
    """A block that would carry something from one document to the next, run on one document after the other.

    shared: whether it is given all ranks' documents, or own ones. Put inside `share` or `keep_own`.
    """
    inner = module.forward

    def forward(*args, **kwargs):
        tokens = current_tokens()
        lengths = tokens.documents if shared else tokens.documents_R[tokens.rank]
        results = []
        for index, (start, stop) in enumerate(bounds(lengths)):
            piece = partial(_cut, rows=slice(start, stop))
            own_args, own_kwargs = _changed((args, kwargs), sum(lengths), piece, (index,))
            results.append(inner(*own_args, **own_kwargs))
        return _joined(results)

    module.forward = forward


def token_dim(x: Tensor, count: int, rows: bool = False) -> int | None:
    """Where the `count` tokens of a tensor lie; None if it is not of tokens. rows: whether it is of rows of tokens."""
    whole = not x.is_floating_point() and not x.is_complex() and not rows
    positions = whole and (x.ndim == 2 or (x.ndim == 3 and x.shape[0] > 1))  # [1, T], or several kinds of them, [3, 1, T]
    dim = -1 if x.ndim == 1 or positions else -2
    return dim if x.ndim and x.shape[dim] == count else None


def _changed(value: Any, count: int, change: Change, documents: Sequence[int] | None = None, rows: bool = False) -> Any:
    """Arguments with their tensors of `count` tokens changed, and what is by document cut to `documents`.

    What layers leave in a store for later ones (keys and values, in Gemma 4) is of the documents that they were given, so a
    store holds one of its kind for each choice of documents.
    """

    def changed(item: Any) -> Any:
        if isinstance(item, ByDocument) and documents is not None:
            return item.of(documents)
        if isinstance(item, UserDict) and documents is not None:
            return item.setdefault(tuple(documents), type(item)())
        dim = token_dim(item, count, rows) if isinstance(item, Tensor) else None
        return item if dim is None else change(item, dim)

    return _each(value, changed)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments with what lies in their tuples, lists and dicts changed."""
    if isinstance(value, tuple | list):
        return type(value)(_each(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    return change(value)


def _arrived(value: Any) -> Any:
    return value.finish() if isinstance(value, _Coming) else value


@dataclass(frozen=True)
class _Coming:
    """A tensor that is being gathered."""

    finish: Finish


def _cut(x: Tensor, dim: int, rows: slice | Sequence[slice]) -> Tensor:
    if isinstance(rows, slice):
        return x.narrow(dim, rows.start, rows.stop - rows.start)
    return torch.cat([_cut(x, dim, part) for part in rows], dim)


def _first_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _in_order(outputs: Sequence[Any], pieces: Sequence[DocumentChunk]) -> Any:
    """What parts gave behind their result, as one: indices that an indexer chose, which later layers read, rank by rank."""
    first = outputs[0]
    count = pieces[0].tokens.num_all
    if len(outputs) == 1 or not isinstance(first, Tensor) or first.ndim < 2 or first.shape[-2] != count:
        return first
    together = torch.cat(_as_wide(outputs), -2)
    place_T = torch.cat([torch.arange(rows.start, rows.stop) for part in pieces for rows in part.rows])
    return together.index_select(-2, place_T.argsort().to(together.device))


def _as_wide(results: Sequence[Tensor]) -> list[Tensor]:
    """Indices that indexers chose, fewer in a short document, made as many by naming one of them again."""
    width = max(x.shape[-1] for x in results)
    return [
        torch.cat((x, x[..., :1].expand(*x.shape[:-1], width - x.shape[-1])), -1) if x.shape[-1] < width else x for x in results
    ]


def _joined(results: Sequence[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.cat(_as_wide(results), dim=-2)
    if isinstance(first, tuple):
        return tuple(_joined(parts) for parts in zip(*results, strict=True))
    return first
