"""The packing of a row that a target runs on, known on the host and cached on the device.

Transformers reads from the device whether a row holds several documents, so the host waits for the
device. The engine knows the packing in advance and keeps it in `row_of_forward`. The replacement of
`find_packed_sequence_indices` in this module uses it if the positions are the row's own tensor.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import masking_utils

from engine.batch import to_device


@dataclass(frozen=True)
class PackedRow:
    """A row of documents laid end to end. lengths: tokens of each document."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def position_1T(self) -> Tensor:
        """Position of each token in its document, int64 [1, T]."""
        positions = [torch.arange(length) for length in self.lengths]
        return to_device(torch.cat(positions)[None], self.device)

    @cached_property
    def document_1T(self) -> Tensor:
        """Number of each token's document, int64 [1, T]."""
        document_T = torch.repeat_interleave(torch.tensor(self.lengths))
        return to_device(document_T[None], self.device)


row_of_forward: ContextVar[PackedRow] = ContextVar("the packed row that a target is run on")


def is_view_of(x: Tensor, row_1T: Tensor) -> bool:
    """Return whether `x` [..., T] views the memory of `row_1T`, so that their values are equal."""
    has_its_values = x.dtype == row_1T.dtype and x.data_ptr() == row_1T.data_ptr()
    has_its_length = x.shape[-1] == row_1T.shape[-1]
    return has_its_values and has_its_length and x.stride(-1) == row_1T.stride(-1)


_find_packed = masking_utils.find_packed_sequence_indices


def find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
    """Return the document number of each token as Transformers does; None for a single document.

    It does not wait for the device if `position_ids` are those of the row of the current forward.
    """
    row = row_of_forward.get(None)
    if row is None or position_ids.shape != (1, row.num_tokens):
        return _find_packed(position_ids)
    if len(row.lengths) == 1:
        return None
    if is_view_of(position_ids, row.position_1T):
        return row.document_1T
    return _find_packed(position_ids)


masking_utils.find_packed_sequence_indices = find_packed_sequence_indices
