"""Registry of the losses that `loss.kind` selects."""

from collections.abc import Callable

from engine.config.sections import LossSection
from engine.config.strict import registered
from engine.models.losses.distillation_loss import DistillationLoss
from engine.models.losses.jensen_shannon import JensenShannonLoss
from engine.models.losses.kl import KLLoss
from engine.models.losses.lk import LKAlphaLoss, LKLambdaLoss
from engine.models.losses.total_variation import TotalVariationLoss

MakeLoss = Callable[[LossSection], DistillationLoss]
SHIPPED: dict[str, MakeLoss] = {
    "kl": KLLoss,
    "lk_alpha": LKAlphaLoss,
    "lk_lambda": LKLambdaLoss,
    "total_variation": TotalVariationLoss,
    "jensen_shannon": JensenShannonLoss,
}
_LOSSES = dict(SHIPPED)


def register_loss(kind: str, make_loss: MakeLoss) -> None:
    """Register a loss as `loss.kind=kind`.

    make_loss: returns a `DistillationLoss` for a loss section; usually the class itself.
    """
    _LOSSES[kind] = make_loss


def make_loss(section: LossSection) -> DistillationLoss:
    """Return the loss of a recipe.

    Raises ConfigError if no loss has this name; the message suggests the closest one.
    """
    return registered(_LOSSES, section.kind, key="loss.kind")(section)
