"""The target's LM head: logits of few rows, and argmax and log-sum-exp without [N, V] logits."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import choose_head_stats
from engine.kernels.interface import LogitTransform
from engine.kernels.matmul import linear

_SLOTS_PER_CHUNK = 1024
# Logits of a block fit the last-level cache of a CPU. On a GPU they are 128 MiB in bf16 and are
# read once.
_VOCAB_PER_BLOCK = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class TargetHead:
    """LM head with logits `z = cap(scale * (hidden @ weight.T + bias)) / temperature`.

    `cap(x) = soft_cap * tanh(x / soft_cap)`. The product is computed in the precision of the
    weights, as in the served target, and the rest in fp32.

    weight_VD: [V, D] in the target's precision. bias_V: [V] or None. soft_cap: None = no cap.
    """

    weight_VD: Tensor
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0
    bias_V: Tensor | None = None

    @property
    def transform(self) -> LogitTransform:
        """The transform from the product of hidden states and weights to logits."""
        return LogitTransform(self.scale, self.soft_cap, self.temperature)

    def product(self, hidden_ND: Tensor) -> Tensor:
        """Return `hidden @ weight.T + bias`, [..., D] -> [..., V], in the precision of the head."""
        hidden_ND = hidden_ND.to(self.weight_VD.dtype)
        if self.bias_V is None:
            return linear(hidden_ND, self.weight_VD)
        return F.linear(hidden_ND, self.weight_VD, self.bias_V)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits of hidden states, [..., D] -> fp32 [..., V]."""
        return self.transform(self.product(hidden_ND).float())

    def rows(self, target_ids_U: Tensor) -> "TargetHead":
        """Return a head with the rows `target_ids_U`, int64 [U], ascending; they are copies unless these are all rows."""
        if len(target_ids_U) == len(self.weight_VD):
            return self
        bias_U = None if self.bias_V is None else self.bias_V[target_ids_U]
        return replace(self, weight_VD=self.weight_VD[target_ids_U], bias_V=bias_U)

    def whole(self) -> "TargetHead":
        """Return the head with all of its rows, which is this head; `SharedHead` gathers them."""
        return self

    def argmax_and_lse(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely token and log-sum-exp over the vocabulary for each hidden state.

        Shapes: hidden_ND is [N, D]; returns int32 [N] and fp32 [N]. Of equal logits the first wins.
        """
        _, argmax_N, lse_N = self.best_argmax_and_lse(hidden_ND)
        return argmax_N.to(torch.int32), lse_N

    def best_argmax_and_lse(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest logit, its token and the log-sum-exp for each hidden state.

        Shapes: hidden_ND is [N, D]; returns fp32, int64 and fp32, each [N]. Of equal logits the
        first wins.
        """
        num_slots = hidden_ND.shape[0]
        device = hidden_ND.device
        best_N, lse_N = (torch.empty(num_slots, dtype=torch.float32, device=device) for _ in range(2))
        argmax_N = torch.empty(num_slots, dtype=torch.int64, device=device)
        for start in range(0, num_slots, _SLOTS_PER_CHUNK):
            chunk = slice(start, start + _SLOTS_PER_CHUNK)
            best_N[chunk], argmax_N[chunk], lse_N[chunk] = self._stats_by_vocabulary(hidden_ND[chunk])
        return best_N, argmax_N, lse_N

    def _stats_by_vocabulary(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best_N = torch.full(hidden_ND.shape[:1], -torch.inf, device=hidden_ND.device)
        lse_N = best_N.clone()
        argmax_N = torch.zeros_like(best_N, dtype=torch.int64)
        size = _VOCAB_PER_BLOCK[hidden_ND.device.type]
        for start in range(0, self.weight_VD.shape[0], size):
            block = self._block(slice(start, start + size))
            block_best_N, block_argmax_N, block_lse_N = block.stats(hidden_ND)
            argmax_N = torch.where(block_best_N > best_N, block_argmax_N + start, argmax_N)
            best_N = torch.maximum(best_N, block_best_N)
            lse_N = torch.logaddexp(lse_N, block_lse_N)
        return best_N, argmax_N, lse_N

    def stats(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest logit, its first token and the log-sum-exp of each row, [N] each.

        The logits of all rows are held at once.
        """
        fused = choose_head_stats(hidden_ND.device)
        if fused is not None:
            best_N, argmax_N, lse_N = fused(self.product(hidden_ND), self.transform)
            return best_N, argmax_N, lse_N
        logits_NV = self.logits(hidden_ND)
        best_N, argmax_N = logits_NV.max(dim=-1)
        # Computed in place, so that only one tensor of the size of the logits exists.
        above_N = logits_NV.sub_(best_N[:, None]).exp_().sum(dim=-1)
        return best_N, argmax_N, above_N.log_() + best_N

    def _block(self, block: slice) -> "TargetHead":
        bias_V = None if self.bias_V is None else self.bias_V[block]
        return replace(self, weight_VD=self.weight_VD[block], bias_V=bias_V)
