"""The seam between online and offline training: anything that says what the target makes of a packed batch."""

from typing import Protocol

from torch import Tensor

from engine.batch import PackedBatch, TargetOutput


class TargetSource(Protocol):
    """Turns a packed batch into what the draft learns from; the target itself may run now or have run long ago."""

    def __call__(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput:
        """batch, slots_N: on the host. slots_N: int64 [N], ascending positions whose target distribution is learned."""
        ...
