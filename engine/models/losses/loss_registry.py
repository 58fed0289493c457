"""The losses that `loss.kind` can name."""

from collections.abc import Callable

from engine.config.sections import LossSection
from engine.config.strict import did_you_mean
from engine.models.losses.distillation_loss import DistillationLoss
from engine.models.losses.jensen_shannon import JensenShannonLoss
from engine.models.losses.kl import KLLoss
from engine.models.losses.lk import LKAlphaLoss, LKLambdaLoss
from engine.models.losses.total_variation import TotalVariationLoss

MakeLoss = Callable[[LossSection], DistillationLoss]
_LOSSES: dict[str, MakeLoss] = {
    "kl": KLLoss,
    "lk_alpha": LKAlphaLoss,
    "lk_lambda": LKLambdaLoss,
    "total_variation": TotalVariationLoss,
    "jensen_shannon": JensenShannonLoss,
}


def register_loss(kind: str, make_loss: MakeLoss) -> None:
    """Make a loss known as `loss.kind=kind`. make_loss: usually the class, a `DistillationLoss`."""
    _LOSSES[kind] = make_loss


def make_loss(section: LossSection) -> DistillationLoss:
    """Return the loss of a recipe. Raises ValueError, naming the nearest one, if there is none of that name."""
    if section.kind not in _LOSSES:
        hint = did_you_mean(section.kind, _LOSSES)
        raise ValueError(f"loss.kind = {section.kind}: expected {' | '.join(_LOSSES)}{hint}")
    return _LOSSES[section.kind](section)
