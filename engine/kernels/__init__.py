"""The hot operations of draft training; which implementation of each runs is decided here and nowhere else."""

import torch

from engine.kernels import blocked_attention, reference
from engine.kernels.interface import AttentionRows, LossRows, RowWeights, SlotTargets, VocabLoss
from engine.kernels.vocab_loss import vocab_loss

__all__ = ["AttentionRows", "LossRows", "RowWeights", "SlotTargets", "VocabLoss", "ancestor_attention", "vocab_loss"]


def ancestor_attention(query_QHE: torch.Tensor, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.ancestor_attention`, as the device of its query does it best."""
    on_cpu = query_QHE.device.type == "cpu"
    return (blocked_attention if on_cpu else reference).ancestor_attention(query_QHE, *arguments)
