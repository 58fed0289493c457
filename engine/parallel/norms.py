"""RMSNorms over features of which each rank of a group holds a part."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.parallel.collectives import sum_over
from engine.parallel.mesh import Group


def norm_over(norm: nn.Module, group: Group) -> None:
    """The mean of squares of [..., T, F] is over all ranks' features; a collective a call."""
    epsilon = required_epsilon(norm)

    def forward(hidden_TF: Tensor) -> Tensor:
        square_T1 = sum_over(hidden_TF.float().pow(2).sum(-1, keepdim=True), group) / (hidden_TF.shape[-1] * group.size)
        normed_TF = (hidden_TF.float() * torch.rsqrt(square_T1 + epsilon)).to(hidden_TF.dtype)
        weight_F: Any = norm.weight  # a tensor, which nn.Module does not say
        return (weight_F * normed_TF).to(hidden_TF.dtype)

    norm.forward = forward


def norm_late(mixer: nn.Module, name: str, num_groups: int, group: Group) -> None:
    """Mend behind a mixer what its norm did within, which was over own features alone: one collective a call of the mixer.

    An RMSNorm multiplies a token's features by one number, which a linear map passes on, and a mixer has no other map behind
    this norm. So no document waits for other ranks in the middle of the mixer, and the sums of squares of all of them cross at
    once. name: of the norm. num_groups: parts of all features that are normed each for itself, at most one a rank. What a mixer
    gives behind its result is a state for a cache that nobody reads, and is dropped.
    """
    run = mixer.forward
    norm = mixer.get_submodule(name)
    norm_own = norm.forward
    epsilon = required_epsilon(norm)
    means = []
    own_group = group.rank * num_groups // group.size
    ranks = group.size // num_groups

    def norm_and_note(hidden_TF: Tensor, gate: Tensor | None = None) -> Tensor:
        gated_TF = hidden_TF.float() if gate is None else hidden_TF.float() * F.silu(gate.float())  # as Mamba 2 gates
        means.append(gated_TF.pow(2).mean(-1, keepdim=True))
        return norm_own(hidden_TF) if gate is None else norm_own(hidden_TF, gate)

    def forward(*args, **kwargs):
        means.clear()
        output = run(*args, **kwargs)
        own_T1 = torch.cat(means, -2)
        of_groups_TN = own_T1.new_zeros(*own_T1.shape[:-1], num_groups)
        of_groups_TN[..., own_group] = own_T1[..., 0]
        all_T1 = sum_over(of_groups_TN, group)[..., own_group, None] / ranks
        factor_T1 = ((own_T1 + epsilon) / (all_T1 + epsilon)).sqrt()
        if isinstance(output, Tensor):
            return (output * factor_T1).to(output.dtype)
        return (output[0] * factor_T1).to(output[0].dtype), *(None for _ in output[1:])

    norm.forward = norm_and_note
    mixer.forward = forward


def epsilon_of(norm: nn.Module) -> float | None:
    """Return what a norm adds to the mean of squares, None where it does not say."""
    named = (getattr(norm, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((value for value in named if value is not None), None)


def required_epsilon(norm: nn.Module) -> float:
    """Return the epsilon of a norm that has one."""
    epsilon = epsilon_of(norm)
    assert epsilon is not None, f"{type(norm).__name__} does not name its epsilon"
    return epsilon
