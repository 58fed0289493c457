"""Cross-entropy with the target's distribution. It differs from the KL divergence by a constant."""

from torch import Tensor

from engine.batch import LossNorms
from engine.kernels import RowWeights
from engine.models.losses.distillation_loss import DistillationLoss


class KLLoss(DistillationLoss):
    """Cross-entropy `-sum_v p[v] log q[v]`, in nats, divided by the number of slots.

    Source: EAGLE-3 (arXiv:2503.01840), section 3.
    """

    def weights(self, norms: LossNorms, acceptance_S: Tensor | None) -> RowWeights:
        num_steps = norms.loss_rows_S.numel()
        return RowWeights((1 / norms.slots).expand(num_steps))
