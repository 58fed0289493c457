"""Small experts of Transformers with grouped products, and rows and choices for them."""

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

EXPERTS = 8
WIDTH = 48
CHOICES = 3


def grouped_experts() -> nn.Module:
    """Eight experts with the same weights in every call."""
    config = Qwen3MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=16, num_experts=EXPERTS, num_experts_per_tok=CHOICES, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for weight in experts.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return experts


def grouped_inputs(seed: int, count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, choices and their weights."""
    generator = torch.Generator().manual_seed(seed)
    weight_TK, index_TK = torch.rand(count, EXPERTS, generator=generator).softmax(-1).topk(CHOICES, dim=-1)
    return torch.randn(count, WIDTH, generator=generator), index_TK, weight_TK
