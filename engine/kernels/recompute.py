"""Activation checkpointing: the backward pass recomputes activations instead of keeping them."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)` without keeping intermediate activations.

    The function must have no side effects and draw no random numbers.
    """
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
