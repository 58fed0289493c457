"""Interface of distillation losses. Every draft method can train with every loss.

For one row, `p` is the target's softmax over the draft vocabulary, `p_full` are the target's
probabilities under its full vocabulary, and `q` is the draft's softmax. The chunked pass of
`engine/kernels/vocab_loss.py` computes cross-entropy and acceptance of every row in fused kernels.
A loss that is a weighted sum of these provides only its weights. Any other loss also provides a
score, which the same pass evaluates in plain PyTorch, chunk by chunk.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from engine.batch import LossNorms
from engine.config.sections import LossSection
from engine.kernels import RowScore, RowWeights


class DistillationLoss(ABC):
    """Base class of the losses that `loss.kind` selects.

    needs_acceptance: whether `weights` depends on the mean acceptance rate of each step, which
        takes an extra no-grad pass.
    score: the loss of a row and its derivative, for losses that the fused statistics do not
        express; None = not needed.
    """

    needs_acceptance: bool = False
    score: RowScore | None = None

    def __init__(self, section: LossSection) -> None:
        self.section = section

    @abstractmethod
    def weights(self, norms: LossNorms, acceptance_S: Tensor | None) -> RowWeights:
        """Return the weight of each part of a row's loss, without the weights of the TTT steps.

        norms: divisors, fixed before the backward pass.
        acceptance_S: fp32 [S], mean acceptance rate of each step, if `needs_acceptance` is set.
        """


class ScoredLoss(DistillationLoss):
    """A loss that is its score alone, averaged over the rows with loss."""

    def weights(self, norms: LossNorms, acceptance_S: Tensor | None) -> RowWeights:
        assert self.score is not None, f"{type(self).__name__} has no score"
        return RowWeights(torch.zeros_like(norms.per_row_S), score_S=norms.per_row_S, score=self.score)
