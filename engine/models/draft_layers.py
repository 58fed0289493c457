"""Modules that drafts of several methods are made of."""

from typing import Any, Protocol

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.kernels import Kernels
from engine.kernels.matmul import Linear


class RotaryShape(Protocol):
    """The sizes that rotary embeddings depend on."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def rope_parameters(self) -> dict[str, Any]: ...


class RotaryTable:
    """Rotary embeddings in fp32.

    This is not a module, so that casting the draft to bf16 does not change the frequencies.
    """

    def __init__(self, config: RotaryShape) -> None:
        llama = LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(config.rope_parameters),
        )
        rotary = LlamaRotaryEmbedding(llama)
        self.inv_freq = rotary.inv_freq.float()
        self.attention_scaling = rotary.attention_scaling

    def cos_sin(self, position_Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine, fp32 [Q, 1, E] each, for positions int64 [Q]."""
        self.inv_freq = self.inv_freq.to(position_Q.device)
        angle_QE = torch.outer(position_Q.float(), self.inv_freq).repeat(1, 2)[:, None]
        return angle_QE.cos() * self.attention_scaling, angle_QE.sin() * self.attention_scaling


class RmsNorm(nn.RMSNorm):
    eps: float

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__(size, eps)
        self.kernels = kernels

    def forward(self, x_QD: torch.Tensor) -> torch.Tensor:
        return self.kernels.elementwise.rms_norm(x_QD, self.weight, self.eps)


class SwigluMlp(nn.Module):
    """MLP with SwiGLU, of rows [Q, D]."""

    def __init__(self, size: int, width: int, kernels: Kernels) -> None:
        """Create it. size: features D. width: inner features F."""
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Linear(size, width)
        self.up_proj = Linear(size, width)
        self.down_proj = Linear(width, size)

    def forward(self, x_QD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.kernels.elementwise.swiglu(self.gate_proj(x_QD), self.up_proj(x_QD)))
