"""Products with this rank's experts: sort rows by expert, multiply them, sum results by token.

T: tokens. K: choices per token. M: choices of local experts, known on the host. D: hidden size.
If the experts have grouped products, nothing here waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from engine.kernels import choose_token_permute


@dataclass(frozen=True)
class SortedChoices:
    """Choices of local experts, sorted by expert, then by token.

    row_M: row of each choice.
    expert_M: expert of each choice.
    choice_M: index of each choice in the flattened [T, K].
    place_TK: index of each choice among the sorted ones; -1 if its expert is not local.
    ends_X: int32, end of each expert's choices.
    """

    row_M: Tensor
    expert_M: Tensor
    choice_M: Tensor
    place_TK: Tensor
    ends_X: Tensor

    @classmethod
    def of(cls, index_TK: Tensor, num_experts: int, num_choices: int) -> "SortedChoices":
        """Sort choices without waiting for the device.

        index_TK: local ids; `num_experts` or more for a choice that is not computed here.
        num_choices: number of choices that are computed here.
        """
        expert_S, choice_S = index_TK.flatten().sort(stable=True)
        number_S = torch.arange(len(choice_S), device=choice_S.device)
        place_S = torch.empty_like(choice_S).scatter_(0, choice_S, number_S)
        place_S = place_S.masked_fill_(place_S >= num_choices, -1)
        own_M = choice_S[:num_choices]
        experts_X = torch.arange(num_experts, dtype=expert_S.dtype, device=expert_S.device)
        ends_X = torch.searchsorted(expert_S, experts_X, right=True, out_int32=True)
        row_M = own_M // index_TK.shape[1]
        return cls(row_M, expert_S[:num_choices], own_M, place_S.view(index_TK.shape), ends_X)


Products = Callable[[Tensor, SortedChoices], Tensor]


@dataclass(frozen=True)
class LocalExperts:
    """The experts of this rank, and the function that multiplies rows sorted by expert by them.

    products: maps rows [M, D] and their choices to unweighted results [M, D]. If None, `inner` is
    called with one choice per row, and weights its results itself.
    scales_inputs: whether the router's weight multiplies the input of an expert instead of its
    output.
    """

    inner: Callable[..., Tensor]
    num_experts: int
    products: Products | None = None
    scales_inputs: bool = False

    def __call__(
        self,
        rows_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        num_choices: int,
        dtype: torch.dtype,
        scale_T: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted sum over local experts for each row, [T, D] in `dtype`.

        Results are added in fp32, in the order of K.
        rows_TD: in `dtype`, or e4m3 codes with one scale per row in scale_T.
        index_TK, num_choices: see `SortedChoices.of`.
        """
        permute = choose_token_permute(rows_TD.device)
        out_TD = torch.empty(rows_TD.shape, dtype=dtype, device=rows_TD.device)
        if num_choices == 0:
            return out_TD.zero_()
        choices = SortedChoices.of(index_TK, self.num_experts, num_choices)
        rows_MD = torch.empty(num_choices, rows_TD.shape[1], dtype=dtype, device=rows_TD.device)
        permute.permute_rows(rows_TD, choices.row_M, rows_MD, scale_T)
        if self.products is not None and not self.scales_inputs:
            return permute.unpermute_rows(self.products(rows_MD, choices), choices.place_TK, out_TD, weight_TK)
        weight_M1 = weight_TK.flatten()[choices.choice_M][:, None]
        return permute.unpermute_rows(self._weighted(rows_MD, choices, weight_M1), choices.place_TK, out_TD)

    def _weighted(self, rows_MD: Tensor, choices: SortedChoices, weight_M1: Tensor) -> Tensor:
        if self.products is not None:
            return self.products((rows_MD * weight_M1).to(rows_MD.dtype), choices)
        return self.inner(rows_MD, choices.expert_M[:, None].long(), weight_M1)


def grouped_products(experts: nn.Module) -> Products | None:
    """Return the grouped products of an experts module, or None if the module has none.

    A module has them if it has the attributes of Transformers' experts, and its config selects the
    `grouped_mm` implementation.
    """
    config = getattr(experts, "config", None)
    has_layout = all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    if not has_layout or getattr(config, "_experts_implementation", None) != "grouped_mm":
        return None
    return partial(_grouped, experts)


def _grouped(experts: Any, rows_MD: Tensor, choices: SortedChoices) -> Tensor:
    """Compute Transformers' grouped products for sorted rows, without weighting the results.

    experts: a module that `grouped_products` accepts. It has type Any because nn.Module does not
    type its attributes.
    """
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    inner_MF = _maps(experts, up_name, rows_MD, choices)
    inner_MF = experts._apply_gate(inner_MF) if experts.has_gate else experts.act_fn(inner_MF)
    result_MD = _maps(experts, "down_proj", inner_MF, choices)
    if getattr(experts, "has_post_expert_norm", False):
        result_MD = experts.post_expert_norm(result_MD)
    return result_MD


def _maps(experts: Any, name: str, rows_MK: Tensor, choices: SortedChoices) -> Tensor:
    bias_MN = None
    if experts.has_bias:
        bias_MN = getattr(experts, f"{name}_bias")[choices.expert_M.long()]
    weight = getattr(experts, name)
    return moe._grouped_linear(rows_MK, weight, choices.ends_X, bias=bias_MN, is_transposed=experts.is_transposed)


def gated_products(experts: Any) -> Products:
    """Return the grouped products of Llama 4's experts.

    Their weights are transposed, and gate and up are one weight.
    """

    def products(rows_MD: Tensor, choices: SortedChoices) -> Tensor:
        gate_up_M2F = moe._grouped_linear(rows_MD, experts.gate_up_proj, choices.ends_X, is_transposed=True)
        gate_MF, up_MF = gate_up_M2F.chunk(2, dim=-1)
        inner_MF = up_MF * experts.act_fn(gate_MF)
        return moe._grouped_linear(inner_MF, experts.down_proj, choices.ends_X, is_transposed=True)

    return products


def compute_experts_in_order(decoder: nn.Module) -> None:
    """Let experts with grouped products compute through `LocalExperts`; others stay unchanged."""
    for experts in decoder.modules():
        products = grouped_products(experts)
        if products is not None:
            _compute_in_order(experts, products)


def _compute_in_order(experts: nn.Module, products: Products) -> None:
    local = LocalExperts(experts.forward, experts.get_parameter("down_proj").shape[0], products)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args, **kwargs) -> Tensor:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        index_TK = top_k_index.reshape(-1, top_k_index.shape[-1])
        weight_TK = top_k_weights.reshape(-1, top_k_weights.shape[-1])
        return local(hidden_TD, index_TK, weight_TK, index_TK.numel(), hidden_TD.dtype).view_as(hidden_states)

    experts.forward = forward
