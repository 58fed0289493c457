"""Protocol of training objectives, as `ZeroDraft` runs them."""

from enum import Enum
from typing import Any, Protocol

import torch

from engine.batch import DraftOutput, LossNorms, MicroBatch


class DivisorScope(Enum):
    """Micro-batches of an optimizer step whose counts are added up to the divisor of a loss."""

    GLOBAL_BATCH = "global batch"  # all of them
    RANKS = "ranks"  # those that the ranks process at the same time, in one accumulation step
    MICRO_BATCH = "micro-batch"  # each one alone

    def num_means(self, num_ranks: int, accumulation_steps: int) -> int:
        """Return the number of divided losses whose mean is the loss of an optimizer step.

        The sum of the losses of all micro-batches on all ranks is this many times as large.
        """
        if self is DivisorScope.GLOBAL_BATCH:
            return 1
        if self is DivisorScope.RANKS:
            return accumulation_steps
        return num_ranks * accumulation_steps


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
    def divisor_scope(self) -> DivisorScope:
        """Micro-batches whose counts the losses are divided by.

        Gradients are summed over micro-batches that share a divisor, and averaged over others.
        """
        ...

    def __call__(self, draft: Any, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        """Compute the loss of a micro-batch and the counts behind its metrics."""
        ...

    def logits(self, draft: Any, micro: MicroBatch) -> list[torch.Tensor]:
        """Compute the draft's logits: one tensor [T, U] for each prediction per position."""
        ...
