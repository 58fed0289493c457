"""LK losses, which optimise the acceptance rate of speculative decoding directly.

The acceptance rate of a row is `a = sum_v min(p_full[v], q[v])`.
"""

import torch
from torch import Tensor

from engine.batch import LossNorms
from engine.kernels import RowWeights
from engine.models.losses.distillation_loss import DistillationLoss


class LKAlphaLoss(DistillationLoss):
    """Negative logarithm of the acceptance rate, `-log a`, averaged over the rows with loss."""

    def weights(self, norms: LossNorms, acceptance_S: Tensor | None) -> RowWeights:
        return RowWeights(torch.zeros_like(norms.per_row_S), log_acceptance_S=norms.per_row_S)


class LKLambdaLoss(DistillationLoss):
    """Weighted sum of cross-entropy and rejection rate, `w * kl + (1 - w) * (1 - a)`.

    The weight `w = lk_kl_scale * exp(-lk_kl_decay * mean a)` of each step is not differentiated.
    """

    needs_acceptance = True

    def weights(self, norms: LossNorms, acceptance_S: Tensor | None) -> RowWeights:
        assert acceptance_S is not None
        kl_share_S = self.section.lk_kl_scale * torch.exp(-self.section.lk_kl_decay * acceptance_S)
        return RowWeights(kl_share_S * (1 / norms.slots), rejection_S=(1 - kl_share_S) * norms.per_row_S)
