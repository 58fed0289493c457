"""Which keys a query of a packed document may read, in numbers where Transformers' mask is one that we know, else in squares.

Transformers says it in a function of two places in the row, joined by `and_masks` from few kinds of closure. A kind is told by
its code object, which no other function has, and its numbers are read from the closure. Samples of the function's values would
say nothing of what lies between them; this needs no square and cannot take one mask for another. The tensors in the closures
(positions, document ids) are the row's own, or are compared with them; a test that runs once per process confirms that each
kind of mask means what `Reach` says.
Whatever else there is, such as an overlay of a family's own, is evaluated on each document's square.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from engine.batch import to_device
from engine.kernels.packed_attention import Segments
from engine.parallel.tokens import ByDocument, bounds
from engine.target.packed_row import PackedRow, is_view_of, row_of_forward

MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reach:
    """A query reads itself and what precedes it in its document; None = no further bound.

    window: tokens that it reads at most, itself among them. chunk: size of the chunks, counted from the document's start, to
    which it keeps.
    """

    window: int | None = None
    chunk: int | None = None

    def square(self, length: int, device: torch.device) -> Tensor:
        """bool [L, L], true where a query (row) of a document may read a key (column)."""
        position_L = torch.arange(length, device=device)
        query_L1 = position_L[:, None]
        key_1L = position_L[None, :]
        allowed_LL = key_1L <= query_L1
        if self.window is not None:
            allowed_LL &= key_1L > query_L1 - self.window
        if self.chunk is not None:
            allowed_LL &= key_1L // self.chunk == query_L1 // self.chunk
        return allowed_LL


@dataclass(frozen=True)
class DocumentMasks(ByDocument):
    """lengths: of the documents. reach: of every query; None = the squares say it, bool [L, L] for each document."""

    lengths: tuple[int, ...]
    device: torch.device
    reach: Reach | None = Reach()
    squares: tuple[Tensor, ...] = ()

    def __getitem__(self, slices: tuple[slice, ...]) -> "DocumentMasks":
        """Itself: a family that cuts its mask to the logits wanted, as Gemma 4 does, cuts nothing of a forward for all."""
        assert all(one in (slice(None), slice(0, None)) for one in slices), f"{slices} take a part of the packed documents"
        return self

    def of(self, documents: Sequence[int]) -> "DocumentMasks":
        lengths = tuple(self.lengths[index] for index in documents)
        squares = tuple(self.squares[index] for index in documents) if self.squares else ()
        return DocumentMasks(lengths, self.device, self.reach, squares)

    @cached_property
    def position_T(self) -> Tensor:
        """int64, place of a token in its document."""
        return to_device(torch.cat([torch.arange(length) for length in self.lengths]), self.device)

    @cached_property
    def segments(self) -> Segments | None:
        """What `reach` says to attention: chunks see each other as little as documents do. None = the squares say it."""
        if self.reach is None:
            return None
        lengths = self.lengths
        chunk = self.reach.chunk
        if chunk is not None:
            lengths = tuple(min(chunk, length - start) for length in lengths for start in range(0, length, chunk))
        return Segments(lengths, self.device, self.reach.window)


@dataclass(frozen=True)
class WholeMasks(ByDocument):
    """The same masks as tensors [1, 1, L, L], for modules that are run on one document and make more of them (indexers).

    They are added to the scores, as those of eager attention, which is the one kind that every family takes.
    """

    masks: DocumentMasks
    dtype: torch.dtype

    def of(self, documents: Sequence[int]) -> "WholeMasks | Tensor":
        masks = self.masks.of(documents)
        if len(documents) != 1:
            return WholeMasks(masks, self.dtype)
        square = masks.squares[0] if masks.reach is None else masks.reach.square(masks.lengths[0], masks.device)
        return added(square, self.dtype)[None, None]


def added(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to scores: 0 where they are allowed, else the lowest number."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def document_masks(
    *,
    q_length: int,
    mask_function: MaskFunction,
    device: torch.device,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> DocumentMasks:
    """Return a layer's mask rule, for each document of the packed row.

    q_length: tokens of that row, or, where ranks run the target together, this rank's part of it.
    attention_mask: says which tokens are padding; None = none are.
    """
    row = row_of_forward.get()
    assert row.num_tokens >= q_length, f"documents hold {row.num_tokens} tokens, the row {q_length}"
    reach = reach_of(mask_function, row, is_unpadded=attention_mask is None)
    squares: tuple[Tensor, ...] = ()
    if reach is None:
        squares = tuple(_squares(mask_function, row.lengths, device))
    return DocumentMasks(row.lengths, device, reach, squares)


def whole_masks(*, dtype: torch.dtype = torch.float32, **arguments) -> WholeMasks:
    """`document_masks`, as tensors once a document is taken out."""
    return WholeMasks(document_masks(**arguments), dtype)


def _squares(mask_function: MaskFunction, lengths: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    first = torch.zeros((), dtype=torch.int64, device=device)
    for start, stop in bounds(lengths):
        position_L = torch.arange(start, stop, device=device)
        square = mask_function(first, first, position_L[:, None], position_L[None, :])
        yield square.expand(stop - start, stop - start)


def reach_of(mask_function: MaskFunction, row: PackedRow, is_unpadded: bool = False) -> Reach | None:
    """Return what a mask function allows inside the documents of a row; None if that is not certain.

    is_unpadded: whether it was made for a row without padding. The host waits for the device only
    where the function holds tensors about the packing that are not the row's own.
    """
    found = _Found(row, is_unpadded)
    conditions = _conditions(mask_function)
    known = _kinds_are_as_known() and all(found.add(*condition) for condition in conditions)
    if not known or not found.is_causal:
        return None
    if found.facts and not torch.stack(found.facts).all():
        return None
    return Reach(min(found.windows, default=None), found.chunk)


@dataclass
class _Found:
    """What the conditions of a mask function come to.

    facts: what has to hold and only the device knows, one bool each.
    """

    row: PackedRow
    is_unpadded: bool
    is_causal: bool = False
    windows: list[int] = field(default_factory=list)
    chunk: int | None = None
    facts: list[Tensor] = field(default_factory=list)

    def add(self, kind: str | None, held: Mapping[str, Any], in_document: bool) -> bool:
        """Take a condition in; False if it is none that we know. in_document: whether it counts from a document's start."""
        if kind == "causal":
            self.is_causal = True
        elif kind == "window" and _is_size(held["sliding_window"]):
            self.windows.append(held["sliding_window"])
        elif kind == "chunk" and _is_size(held["chunk_size"]) and self.chunk in (None, held["chunk_size"]):
            self.chunk = held["chunk_size"]
            if not self.is_unpadded:
                self.facts.append((held["left_padding"] == 0).all())
            return in_document or all(start % self.chunk == 0 for start, _ in bounds(self.row.lengths))
        elif kind == "packed" and not in_document:
            return self._holds(held["packed_sequence_mask"], self.row.document_1T)
        elif kind == "remap" and not in_document:
            return self._holds(held["position_ids"], self.row.position_1T)
        else:
            return False
        return True

    def _holds(self, row_BT: Tensor, expected_1T: Tensor) -> bool:
        """Note that the mask counts on this of the row's packing; False if it is of another row."""
        if is_view_of(row_BT, expected_1T):
            return True
        if row_BT.shape[-1] != expected_1T.shape[-1]:
            return False
        self.facts.append((row_BT[0] == expected_1T[0]).all())
        return True


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and number > 0


@cache
def _kinds() -> dict[Any, str]:
    """Kinds of condition by the code of the functions that state them; those that make them are called for their code alone."""
    causal = masking_utils.causal_mask_function
    unread = torch.zeros(1, dtype=torch.int64)
    functions = {
        "causal": causal,
        "and": masking_utils.and_masks(causal),
        "window": masking_utils.sliding_window_overlay(1),
        "chunk": masking_utils.chunked_overlay(1, unread),
        "packed": masking_utils.packed_sequence_mask_function(unread),
    }
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # since Transformers 5.23
        functions["remap"] = masking_utils.remap_positions_for_packed_sequence(causal, unread)
    return {function.__code__: kind for kind, function in functions.items()}


def _conditions(mask_function: MaskFunction, in_document: bool = False) -> Iterator[tuple[str | None, Mapping[str, Any], bool]]:
    """Conditions that all have to hold: kind (None = unknown), what its function closes over, whether `remap` precedes it."""
    kind = _kinds().get(getattr(mask_function, "__code__", None))
    held = inspect.getclosurevars(mask_function).nonlocals if kind else {}
    if kind == "and":
        for one in held["mask_functions"]:
            yield from _conditions(one, in_document)
        return
    yield kind, held, in_document
    if kind == "remap":
        yield from _conditions(held["mask_function"], True)


@cache
def _kinds_are_as_known() -> bool:
    """Whether the installed Transformers means by its masks what `Reach` says."""
    cpu = torch.device("cpu")
    unpadded = torch.zeros(1, dtype=torch.int64)
    pairs: tuple[tuple[Reach, Callable[..., Any]], ...] = (  # Transformers declares them for numbers
        (Reach(), masking_utils.causal_mask_function),
        (Reach(window=3), masking_utils.sliding_window_causal_mask_function(3)),
        (Reach(chunk=3), masking_utils.chunked_causal_mask_function(3, unpadded)),
    )
    return all(torch.equal(reach.square(8, cpu), next(_squares(function, (8,), cpu))) for reach, function in pairs)
