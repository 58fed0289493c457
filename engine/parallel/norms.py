"""RMSNorms over features that are sharded between the ranks of a group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.parallel.collectives import sum_over
from engine.parallel.mesh import Group


def norm_over(norm: nn.Module, group: Group) -> None:
    """Let an RMSNorm of [..., T, F] average squares over the features of all ranks.

    Each call of the norm is a collective (one all-reduce).
    """
    epsilon = required_epsilon(norm)

    def forward(hidden_TF: Tensor) -> Tensor:
        square_T1 = sum_over(hidden_TF.float().pow(2).sum(-1, keepdim=True), group) / (hidden_TF.shape[-1] * group.size)
        normed_TF = (hidden_TF.float() * torch.rsqrt(square_T1 + epsilon)).to(hidden_TF.dtype)
        weight_F: Any = norm.weight  # a tensor, but nn.Module does not type it
        return (weight_F * normed_TF).to(hidden_TF.dtype)

    norm.forward = forward


def norm_late(mixer: nn.Module, name: str, num_groups: int, group: Group) -> None:
    """Correct a rank-local RMSNorm after the mixer with one all-reduce per call of the mixer.

    An RMSNorm multiplies a token's features by one factor, and a linear map preserves this factor.
    The output map is the only map of the mixer after this norm, so the factor can be corrected in
    the mixer's output. Documents then need no communication inside the mixer, and the sums of
    squares of all documents are exchanged at once.
    name: name of the norm in the mixer.
    num_groups: groups of features that are normalised separately, at most one per rank.
    Further outputs of the mixer are states for a cache that is not used; they are replaced by None.
    """
    run = mixer.forward
    norm = mixer.get_submodule(name)
    norm_own = norm.forward
    epsilon = required_epsilon(norm)
    means = []
    own_group = group.rank * num_groups // group.size
    ranks = group.size // num_groups

    def norm_and_note(hidden_TF: Tensor, gate: Tensor | None = None) -> Tensor:
        # Mamba 2 applies the gate before the norm.
        gated_TF = hidden_TF.float() if gate is None else hidden_TF.float() * F.silu(gate.float())
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
    """Return the epsilon that a norm adds to the mean of squares, or None if it is unknown."""
    named = (getattr(norm, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((value for value in named if value is not None), None)


def required_epsilon(norm: nn.Module) -> float:
    """Return the epsilon of a norm that must have one."""
    epsilon = epsilon_of(norm)
    assert epsilon is not None, f"{type(norm).__name__} does not name its epsilon"
    return epsilon
