"""What a distillation loss provides. Every draft method can train with every loss.

For one row, `p` is the target's softmax over the draft vocabulary, `p_full` are the target's probabilities under its full
vocabulary, and `q` is the draft's softmax. The chunked pass of `engine/kernels/vocab_loss.py` forms cross-entropy and
acceptance of every row in fused kernels. A loss that is a weighted sum of these provides its weights alone. Any other loss also
provides a score, which the same pass evaluates in plain PyTorch, chunk by chunk.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from engine.batch import LossNorms
from engine.config.sections import LossSection
from engine.kernels import RowScore, RowWeights


class DistillationLoss(ABC):
    """A loss chosen by `loss.kind`.

    needs_acceptance: whether `weights` depends on the mean acceptance rate of each step, which takes an extra no-grad pass.
    score: the loss of a row and its derivative, for losses that fused statistics do not express; None = not needed.
    """

    needs_acceptance: bool = False
    score: RowScore | None = None

    def __init__(self, section: LossSection) -> None:
        self.section = section

    @abstractmethod
    def weights(self, norms: LossNorms, acceptance_S: Tensor | None) -> RowWeights:
        """Return what each part of a row's loss is multiplied by, before the weights of the TTT steps.

        norms: divisors, fixed before the backward pass. acceptance_S: fp32 [S], mean acceptance rate of each step, where
        `needs_acceptance` asks for it.
        """
