"""The hot operations of draft training; which implementation of each runs is decided here and nowhere else."""

from engine.kernels.reference import RowLosses, ancestor_attention, vocab_loss

__all__ = ["RowLosses", "ancestor_attention", "vocab_loss"]
