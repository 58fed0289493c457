"""A plugin with a loss and a source of hidden states; docs/extending.md shows this file."""

from dataclasses import replace

import torch
from torch import Tensor

from engine.batch import PackedBatch, TargetOutput
from engine.hidden_states.protocol import Target, register_source
from engine.hidden_states.sources import OnlineSource
from engine.models.losses.distillation_loss import ScoredLoss
from engine.models.losses.loss_registry import register_loss
from engine.target.head import TargetHead


def reverse_kl(p_kU: Tensor, log_q_kU: Tensor) -> tuple[Tensor, Tensor]:
    """`KL(q || p)` of each row, [k], and its derivative by `q`, [k, U]."""
    log_ratio_kU = log_q_kU - p_kU.clamp_min(1e-20).log()
    return (log_q_kU.exp() * log_ratio_kU).sum(-1), log_ratio_kU + 1


class ReverseKLLoss(ScoredLoss):
    """The reverse KL divergence, averaged over the rows with loss."""

    score = staticmethod(reverse_kl)


register_loss("reverse_kl", ReverseKLLoss)


class NoisyTarget:
    """A target whose auxiliary hidden states carry uniform noise."""

    def __init__(self, target: Target, noise: float) -> None:
        self._target = target
        self._noise = noise
        self.aux_layers = target.aux_layers
        self.dtype = target.dtype
        self.embedding = target.embedding

    def __call__(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput:
        output = self._target(batch, slots_N)
        noise_TA = torch.empty_like(output.aux_TA).uniform_(-self._noise, self._noise)
        return replace(output, aux_TA=output.aux_TA + noise_TA)

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        return self._target.head_rows(target_ids_U)


class NoisySource(OnlineSource):
    """The running target with noise on its hidden states; acceptance is measured afterwards, with measure_acceptance.py."""

    can_decode = False

    def load_target(self, aux_layers: tuple[int, ...]) -> NoisyTarget:
        return NoisyTarget(super().load_target(aux_layers), noise=0.05)


register_source("noisy", NoisySource)
