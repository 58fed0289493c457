"""Activations that are computed again in the backward pass instead of being kept."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`; what it computes on the way is not kept. It must be pure and draw no random numbers."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
