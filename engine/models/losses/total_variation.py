"""Total variation distance between the draft's and the target's distribution.

Both distributions are over the draft vocabulary.
"""

from torch import Tensor

from engine.models.losses.distillation_loss import ScoredLoss


def total_variation(p_kU: Tensor, log_q_kU: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `sum_v |p[v] - q[v]| / 2` of each row, [k], and its derivative by `q`, [k, U]."""
    difference_kU = log_q_kU.exp() - p_kU
    return difference_kU.abs().sum(-1) / 2, difference_kU.sign() / 2


class TotalVariationLoss(ScoredLoss):
    """Total variation distance, averaged over the rows with loss."""

    score = staticmethod(total_variation)
