"""What wraps a module of the target so that its ranks share it: forwards are exchanged, the module knows nothing of it.

Token dimension: the last one of whole numbers [1, T], else the last but one ([1, T, D], [1, T, E]); of what is called with rows
of tokens, as experts are, the first ([T, D], [T, K]).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.parallel.collectives import gather_rows, sum_rows
from engine.parallel.mesh import Group
from engine.parallel.tokens import ByDocument, bounds, current_tokens

Change = Callable[[Tensor, int], Tensor]


def share(module: nn.Module, group: Group, rows: bool = False) -> None:
    """A sharded block: all ranks' tokens in at its door, and out of its partial results the sum for own tokens.

    rows: whether it is called with rows of tokens.
    """
    inner = module.forward

    def forward(*args, **kwargs):
        tokens = current_tokens()

        def gathered(x: Tensor, dim: int) -> Tensor:
            return gather_rows(x, dim, tokens.counts_R, group)

        args, kwargs = (_changed(value, tokens.num_own, gathered, rows=rows) for value in (args, kwargs))
        return _first(inner(*args, **kwargs), lambda x: sum_rows(x, -2, tokens.counts_R, group))

    module.forward = forward


def keep_own(module: nn.Module) -> None:
    """A replicated block: what comes gathered (positions, rotary embeddings, masks) is cut to own tokens."""
    inner = module.forward

    def forward(*args, **kwargs):
        tokens = current_tokens()
        own = partial(_cut, rows=tokens.own)
        if tokens.num_own < tokens.num_all:
            args, kwargs = (_changed(value, tokens.num_all, own, tokens.own_documents) for value in (args, kwargs))
        return inner(*args, **kwargs)

    module.forward = forward


def by_document(module: nn.Module, shared: bool) -> None:
    """A block that would carry something from one document to the next, run on one document after the other.

    shared: whether it is given all ranks' documents, or own ones. Put inside `share` or `keep_own`.
    """
    inner = module.forward

    def forward(*args, **kwargs):
        tokens = current_tokens()
        lengths = tokens.documents if shared else tokens.documents[tokens.own_documents]
        results = []
        for index, (start, stop) in enumerate(bounds(lengths)):
            piece = partial(_cut, rows=slice(start, stop))
            pieces = [_changed(value, sum(lengths), piece, slice(index, index + 1)) for value in (args, kwargs)]
            results.append(inner(*pieces[0], **pieces[1]))
        return _joined(results)

    module.forward = forward


def token_dim(x: Tensor, count: int, rows: bool = False) -> int | None:
    """Where the `count` tokens of a tensor lie; None if it is not of tokens. rows: whether it is of rows of tokens."""
    whole = not x.is_floating_point() and not x.is_complex() and not rows
    positions = whole and (x.ndim == 2 or (x.ndim == 3 and x.shape[0] > 1))  # [1, T], or several kinds of them, [3, 1, T]
    dim = -1 if x.ndim == 1 or positions else -2
    return dim if x.ndim and x.shape[dim] == count else None


def _changed(value: Any, count: int, change: Change, documents: slice | None = None, rows: bool = False) -> Any:
    """Arguments with their tensors of `count` tokens changed, and what is by document cut to `documents`."""
    if isinstance(value, Tensor):
        dim = token_dim(value, count, rows)
        return value if dim is None else change(value, dim)
    if isinstance(value, ByDocument):
        return value if documents is None else value.of(documents)
    if isinstance(value, tuple | list):
        return type(value)(_changed(item, count, change, documents, rows) for item in value)
    if isinstance(value, dict):
        return {key: _changed(item, count, change, documents, rows) for key, item in value.items()}
    return value


def _cut(x: Tensor, dim: int, rows: slice) -> Tensor:
    return x.narrow(dim, rows.start, rows.stop - rows.start)


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output with its first tensor changed; what stands behind it (weights of attention, router logits) nobody reads."""
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


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
