"""Masks of packed documents: which keys each query may read.

A mask of Transformers that this module recognises becomes a few numbers (`Reach`). Any other mask,
such as an overlay defined by a model family, is evaluated on one square per document.

Transformers expresses a mask as a function of two positions in the row, which `and_masks` composes
from a few kinds of closure. A kind is recognised by its code object, which no other function has,
and its numbers are read from the closure. This needs no square and cannot confuse two masks, while
samples of the function's values would not show what lies between them. Tensors in the closures
(positions, document ids) are those of the row, or are compared with them. A check that runs once
per process confirms that each kind of mask means what `Reach` says.
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
    """Bounds of a causal mask inside a document: a query reads itself and tokens before it.

    window: largest number of tokens that a query reads, including itself; None = no limit.
    chunk: size of the chunks, counted from the start of the document, within which a query reads;
    None = no chunks.
    """

    window: int | None = None
    chunk: int | None = None

    def square(self, length: int, device: torch.device) -> Tensor:
        """Return a document's mask, bool [L, L], true if a query (row) may read a key (column)."""
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
    """The mask of one kind of layer for each document of a packed row.

    lengths: tokens of each document. reach: bounds of every query; None = `squares` hold the masks.
    squares: the mask of each document, bool [L, L]; empty if `reach` is given.
    """

    lengths: tuple[int, ...]
    device: torch.device
    reach: Reach | None = Reach()
    squares: tuple[Tensor, ...] = ()

    def __getitem__(self, slices: tuple[slice, ...]) -> "DocumentMasks":
        """Return the same masks.

        Some families, such as Gemma 4, slice their mask to the logits that are wanted. In a forward
        for all logits, the slice is the whole mask.
        """
        assert all(one in (slice(None), slice(0, None)) for one in slices), f"{slices} take a part of the packed documents"
        return self

    def of(self, documents: Sequence[int]) -> "DocumentMasks":
        lengths = tuple(self.lengths[index] for index in documents)
        squares = tuple(self.squares[index] for index in documents) if self.squares else ()
        return DocumentMasks(lengths, self.device, self.reach, squares)

    @cached_property
    def position_T(self) -> Tensor:
        """Position of each token in its document, int64 [T]."""
        return to_device(torch.cat([torch.arange(length) for length in self.lengths]), self.device)

    @cached_property
    def segments(self) -> Segments | None:
        """Segments for packed attention; None if `squares` hold the masks.

        A chunk is a segment like a document, since chunks do not attend to each other either.
        """
        if self.reach is None:
            return None
        lengths = self.lengths
        chunk = self.reach.chunk
        if chunk is not None:
            lengths = tuple(min(chunk, length - start) for length in lengths for start in range(0, length, chunk))
        return Segments(lengths, self.device, self.reach.window)


@dataclass(frozen=True)
class WholeMasks(ByDocument):
    """Document masks that become tensors [1, 1, L, L], for modules that run one document at a time.

    Such modules (indexers) derive further masks from the tensor. The tensors are added to the
    scores, as in eager attention, which is the only form that every family accepts.
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
    """Return a bool mask in additive form: 0 where true, the lowest finite number elsewhere."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def document_masks(
    *,
    q_length: int,
    mask_function: MaskFunction,
    device: torch.device,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> DocumentMasks:
    """Return a layer's mask for each document of the packed row; Transformers calls it.

    q_length: tokens of that row, or of this rank's part of it if ranks run the target together.
    attention_mask: marks padding; None = there is no padding.
    """
    row = row_of_forward.get()
    assert row.num_tokens >= q_length, f"documents hold {row.num_tokens} tokens, the row {q_length}"
    reach = reach_of(mask_function, row, is_unpadded=attention_mask is None)
    squares: tuple[Tensor, ...] = ()
    if reach is None:
        squares = tuple(_squares(mask_function, row.lengths, device))
    return DocumentMasks(row.lengths, device, reach, squares)


def whole_masks(*, dtype: torch.dtype = torch.float32, **arguments) -> WholeMasks:
    """Return a layer's masks in a form that becomes a tensor when one document is selected.

    arguments: as in `document_masks`.
    """
    return WholeMasks(document_masks(**arguments), dtype)


def _squares(mask_function: MaskFunction, lengths: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    first = torch.zeros((), dtype=torch.int64, device=device)
    for start, stop in bounds(lengths):
        position_L = torch.arange(start, stop, device=device)
        square = mask_function(first, first, position_L[:, None], position_L[None, :])
        yield square.expand(stop - start, stop - start)


def reach_of(mask_function: MaskFunction, row: PackedRow, is_unpadded: bool = False) -> Reach | None:
    """Return what a mask function allows inside the documents of a row; None if that is not certain.

    is_unpadded: whether the function was made for a row without padding.
    The host waits for the device only if the function holds tensors about the packing that do not
    share the memory of the row's tensors.
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
    """The combined conditions of a mask function.

    facts: conditions that only the device can decide and that have to be true, one bool each.
    """

    row: PackedRow
    is_unpadded: bool
    is_causal: bool = False
    windows: list[int] = field(default_factory=list)
    chunk: int | None = None
    facts: list[Tensor] = field(default_factory=list)

    def add(self, kind: str | None, held: Mapping[str, Any], in_document: bool) -> bool:
        """Add a condition; returns False if it is not supported.

        in_document: whether the condition counts positions from the start of the document.
        """
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
        """Require a mask's tensor to equal that of the row; returns False if the lengths differ."""
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
    """Return the kind of condition by the code object of the function that expresses it.

    The factories are called only to obtain the code of the functions that they make.
    """
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
    """Yield the conditions of a mask function, all of which have to hold.

    Each is a kind (None = unknown), the variables that its function closes over, and whether
    `remap` precedes it.
    """
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
    """Return whether the masks of the installed Transformers mean what `Reach` says."""
    cpu = torch.device("cpu")
    unpadded = torch.zeros(1, dtype=torch.int64)
    pairs: tuple[tuple[Reach, Callable[..., Any]], ...] = (  # Transformers annotates them for int
        (Reach(), masking_utils.causal_mask_function),
        (Reach(window=3), masking_utils.sliding_window_causal_mask_function(3)),
        (Reach(chunk=3), masking_utils.chunked_causal_mask_function(3, unpadded)),
    )
    return all(torch.equal(reach.square(8, cpu), next(_squares(function, (8,), cpu))) for reach, function in pairs)
