"""Jensen-Shannon divergence between the draft's and the target's distribution.

Both distributions are over the draft vocabulary.
"""

import torch
from torch import Tensor

from engine.models.losses.distillation_loss import ScoredLoss

SMALLEST = torch.finfo(torch.float32).tiny


def jensen_shannon(p_kU: Tensor, log_q_kU: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2` for each row, in nats.

    Returns the divergence, [k], and its derivative with respect to `q`, [k, U].
    Source: Lin, "Divergence measures based on the Shannon entropy" (1991).
    """
    q_kU = log_q_kU.exp()
    log_m_kU = ((p_kU + q_kU) / 2).clamp_min(SMALLEST).log()
    log_p_kU = p_kU.clamp_min(SMALLEST).log()
    from_p_k = (p_kU * (log_p_kU - log_m_kU)).sum(-1)
    from_q_k = (q_kU * (log_q_kU - log_m_kU)).sum(-1)
    return (from_p_k + from_q_k) / 2, (log_q_kU - log_m_kU) / 2


class JensenShannonLoss(ScoredLoss):
    """Jensen-Shannon divergence, averaged over the rows with loss."""

    score = staticmethod(jensen_shannon)
