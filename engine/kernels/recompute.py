"""Activation checkpointing: the backward pass recomputes activations instead of keeping them."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)` without keeping intermediate activations.

    The function must have no side effects and draw no random numbers.
    """
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def recomputed_if(condition: bool) -> Callable[..., Any]:
    """Return `recomputed`, or, unless the condition holds, a function that calls another one in the usual way."""
    return recomputed if condition else _called


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
