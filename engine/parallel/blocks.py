"""Wrappers that let ranks share a module of the target by replacing its `forward`.

Token dimension: the last one of an integer tensor [1, T], otherwise the last but one ([1, T, D],
[1, T, E]). Modules that are called with rows of tokens, such as experts, have it first ([T, D] and
[T, K]).
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
from engine.parallel.tokens import ByDocument, DocumentChunk, Tokens, bounds, current_tokens, tokens_of_forward
from engine.parallel.vocab_shard import VocabShard

Change = Callable[[Tensor, int], Any]


def share(module: nn.Module, group: Group, rows: bool = False, parts: int = 1) -> None:
    """Gather all ranks' tokens before a sharded module, and reduce-scatter its results after it.

    rows: whether the module is called with rows of tokens ([T, D]).
    parts: maximum number of chunks, each with whole documents of every rank. While one chunk is
    computed, the inputs of the next one are gathered and the results of the previous one are
    summed.
    """
    module.forward = _SharedModule(module.forward, group, rows, parts if group.size > 1 else 1).forward


@dataclass(frozen=True)
class _SharedModule:
    """A sharded module with the collectives around it.

    inner: its own forward. group: the ranks that share it. rows: as in `share`. parts: maximum
    number of chunks; 1 without other ranks.
    """

    inner: Callable[..., Any]
    group: Group
    rows: bool
    parts: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tokens = current_tokens()
        chunks = tokens.parts(self.parts)
        outputs = []
        sums = []
        narrows = len(chunks) > 1
        coming = self._start_gathering((args, kwargs), tokens, chunks[0], narrows)
        for index, chunk in enumerate(chunks):
            own_args, own_kwargs = _each(coming, _arrived)
            if index + 1 < len(chunks):
                coming = self._start_gathering((args, kwargs), tokens, chunks[index + 1], narrows)
            with tokens_of_forward(chunk.tokens):
                output = self.inner(*own_args, **own_kwargs)
            outputs.append(output)
            sums.append(start_summing(_first_of(output), -2, chunk.tokens.counts_R, self.group))
        first = _concatenated([finish() for finish in sums])
        if isinstance(outputs[0], Tensor):
            return first
        others = zip(*(output[1:] for output in outputs), strict=True)
        return first, *(_in_order(items, chunks) for items in others)

    def _start_gathering(self, arguments: Any, tokens: Tokens, chunk: DocumentChunk, narrows: bool) -> Any:
        """Start to gather a chunk of the nested arguments from all ranks.

        narrows: whether to narrow tensors that every rank has whole, such as positions, to the chunk.
        """

        def gather(x: Tensor, dim: int) -> _Coming:
            own = _cut(x, dim, chunk.own)
            return _Coming(start_gathering(own, dim, chunk.tokens.counts_R, self.group))

        coming = _changed(arguments, tokens.num_own, gather, rows=self.rows)
        if not narrows:
            return coming
        return _changed(coming, tokens.num_all, partial(_cut, rows=chunk.rows), chunk.documents)


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the tokens, without a copy if there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -2)


def share_rows(embedding: nn.Embedding, group: Group) -> None:
    """Let an embedding with rows sharded by `VocabShard` look up this rank's token ids."""
    inner = embedding.forward
    own = VocabShard(embedding.num_embeddings, group)
    embedding.padding_idx = None  # it only affects gradients, and may lie outside of the shard

    def forward(input: Tensor) -> Tensor:
        return own.look_up(inner, input, current_tokens().counts_R)

    embedding.forward = forward  # type: ignore[method-assign]  # modules look it up like any other attribute


def keep_own(module: nn.Module) -> None:
    """Narrow the gathered inputs of a replicated module to local tokens.

    Such inputs are, for example, positions, rotary embeddings and masks.
    """
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
    """Run a module on one document at a time, if it would otherwise carry state between documents.

    shared: whether the module receives the documents of all ranks, or only those of this rank.
    Apply this before `share` or `keep_own`, so that it is the inner wrapper.
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
    """Return the dimension of a tensor that holds its `count` tokens, or None if there is none.

    rows: whether the tensor belongs to a module that is called with rows of tokens.
    """
    whole = not x.is_floating_point() and not x.is_complex() and not rows
    # Positions are [1, T], or [3, 1, T] if there are several kinds of them.
    positions = whole and (x.ndim == 2 or (x.ndim == 3 and x.shape[0] > 1))
    dim = -1 if x.ndim == 1 or positions else -2
    return dim if x.ndim and x.shape[dim] == count else None


def _changed(value: Any, count: int, change: Change, documents: Sequence[int] | None = None, rows: bool = False) -> Any:
    """Apply `change(tensor, dim)` to the tensors of `count` tokens in nested arguments.

    documents: if given, values with one part per document are reduced to these documents.

    Layers of Gemma 4 leave keys and values for later layers in a store. They belong to the
    documents that the layer received, so a store holds one nested store per selection of documents.
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
    """Apply `change` to every item of nested tuples, lists and dicts."""
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
    """Merge an additional output of all chunks in the order of all tokens, rank by rank.

    An example are the indices of an indexer, which later layers read. An output without one row per
    token is taken from the first chunk.
    """
    first = outputs[0]
    count = pieces[0].tokens.num_all
    if len(outputs) == 1 or not isinstance(first, Tensor) or first.ndim < 2 or first.shape[-2] != count:
        return first
    together = torch.cat(_as_wide(outputs), -2)
    place_T = torch.cat([torch.arange(rows.start, rows.stop) for part in pieces for rows in part.rows])
    return together.index_select(-2, place_T.argsort().to(together.device))


def _as_wide(results: Sequence[Tensor]) -> list[Tensor]:
    """Pad the indices of an indexer to one width by repeating the first index.

    Short documents have fewer indices.
    """
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
