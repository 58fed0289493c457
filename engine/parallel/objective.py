"""Protocol of training objectives, as `ZeroDraft` runs them."""

from typing import Any, Protocol

import torch

from engine.batch import DraftOutput, LossNorms, MicroBatch


class Objective(Protocol):
    """Loss function of a draft method on a micro-batch."""

    @property
    def num_steps(self) -> int:
        """Number of predictions per position: TTT steps, or tokens of a block."""
        ...

    @property
    def step_weights(self) -> list[float]:
        """Weight of each prediction in the total loss."""
        ...

    @property
    def is_normalised_globally(self) -> bool:
        """Whether losses are already divided by counts over the global batch.

        Gradients are then summed over ranks instead of averaged.
        """
        ...

    def __call__(self, draft: Any, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        """Compute the loss of a micro-batch and the counts behind its metrics."""
        ...

    def logits(self, draft: Any, micro: MicroBatch) -> list[torch.Tensor]:
        """Compute the draft's logits: one tensor [T, U] for each prediction per position."""
        ...
