"""Target outputs as they travel from the ranks that run the target to those that train the draft."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import TargetOutput
from engine.hidden_states.store_format import DTYPES, from_stored, to_stored

EXACT = "auto"  # overlap.transfer_dtype: each state in the precision in which the draft reads it


@dataclass(frozen=True)
class WireFormat:
    """Format of the states of all batches.

    dtype: `auto`, or a format of the store.
    aux_dtype: precision in which the draft reads auxiliary states. last_dtype: that of the target.
    has_head_stats: whether the draft's loss reads `argmax_N` or `lse_N`, as in `DraftMethod.needs_head_stats`.
    """

    dtype: str
    hidden_size: int
    num_aux: int
    aux_dtype: torch.dtype
    last_dtype: torch.dtype
    has_head_stats: bool = True

    def write(self, output: TargetOutput) -> "WireStates":
        """Return a target's output in this format."""
        aux, aux_scale = self._convert(output.aux_TA, self.aux_dtype, self.num_aux)
        last_hidden, last_scale = self._convert(output.last_hidden_ND, self.last_dtype, 1)
        return WireStates(aux, aux_scale, last_hidden, last_scale, output.argmax_N, output.lse_N)

    def read(self, states: "WireStates", slots_N: Tensor) -> TargetOutput:
        """Return the target's output. slots_N: int64 [N], on the device."""
        return TargetOutput(
            aux_TA=from_stored(states.aux, states.aux_scale),
            slots_N=slots_N,
            last_hidden_ND=from_stored(states.last_hidden, states.last_scale),
            argmax_N=states.argmax_N,
            lse_N=states.lse_N,
        )

    def layout(self, num_tokens: int, num_slots: int) -> "WireStates":
        """Return tensors on the meta device like those that `write` returns."""
        width = self.hidden_size
        with torch.device("meta"):
            empty = TargetOutput(
                aux_TA=torch.empty(num_tokens, self.num_aux * width, dtype=self.aux_dtype),
                slots_N=torch.empty(num_slots, dtype=torch.int64),
                last_hidden_ND=torch.empty(num_slots, width, dtype=self.last_dtype),
                argmax_N=torch.empty(num_slots, dtype=torch.int32) if self.has_head_stats else None,
                lse_N=torch.empty(num_slots, dtype=torch.float32) if self.has_head_stats else None,
            )
            return self.write(empty)

    def _convert(self, states: Tensor, exact: torch.dtype, num_scales: int) -> tuple[Tensor, Tensor | None]:
        if self.dtype == EXACT:
            return states.to(exact), None
        return to_stored(states, self.dtype, num_scales)


@dataclass(frozen=True)
class WireStates:
    """The tensors of a target's output on their way.

    Scales are None except in fp8, `argmax_N` and `lse_N` if the loss does not read them.
    """

    aux: Tensor
    aux_scale: Tensor | None
    last_hidden: Tensor
    last_scale: Tensor | None
    argmax_N: Tensor | None
    lse_N: Tensor | None


assert EXACT not in DTYPES
