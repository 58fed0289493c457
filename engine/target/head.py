"""The target's LM head: exact logits for a few rows, and its argmax and log-sum-exp without ever holding [N, V]."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import choose_head_stats
from engine.kernels.interface import LogitTransform
from engine.kernels.matmul import linear

_SLOTS_PER_CHUNK = 1024
# Logits of a block stay in a CPU's last cache. On a GPU they are 128 MiB in bf16 and are read once.
_VOCAB_PER_BLOCK = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class TargetHead:
    """Logits `z = cap(scale * (hidden @ weight.T + bias)) / temperature`, `cap(x) = soft_cap * tanh(x / soft_cap)`.

    weight_VD: [V, D] in the target's precision; the product is formed in it, as the served target does, the rest in fp32.
    bias_V: [V] or None. soft_cap: None = no cap.
    """

    weight_VD: Tensor
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0
    bias_V: Tensor | None = None

    @property
    def transform(self) -> LogitTransform:
        """The steps behind the product."""
        return LogitTransform(self.scale, self.soft_cap, self.temperature)

    def product(self, hidden_ND: Tensor) -> Tensor:
        """hidden_ND: [..., D] -> [..., V] in the precision of the head, not yet transformed."""
        hidden_ND = hidden_ND.to(self.weight_VD.dtype)
        if self.bias_V is None:
            return linear(hidden_ND, self.weight_VD)
        return F.linear(hidden_ND, self.weight_VD, self.bias_V)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """hidden_ND: [..., D] -> fp32 [..., V]."""
        return self.transform(self.product(hidden_ND).float())

    def rows(self, target_ids_U: Tensor) -> "TargetHead":
        """The head restricted to `target_ids_U`, int64 [U], in that order; its rows are copied."""
        bias_U = None if self.bias_V is None else self.bias_V[target_ids_U]
        return replace(self, weight_VD=self.weight_VD[target_ids_U], bias_V=bias_U)

    def whole(self) -> "TargetHead":
        """Itself; of a head that ranks share, all rows."""
        return self

    def argmax_and_lse(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_ND: [N, D] -> int32 [N] first most likely token, fp32 [N] log-sum-exp over the whole vocabulary."""
        _, argmax_N, lse_N = self.best_argmax_and_lse(hidden_ND)
        return argmax_N.to(torch.int32), lse_N

    def best_argmax_and_lse(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same behind the largest logit, fp32 [N]; the token as int64."""
        num_slots = hidden_ND.shape[0]
        device = hidden_ND.device
        best_N, lse_N = (torch.empty(num_slots, dtype=torch.float32, device=device) for _ in range(2))
        argmax_N = torch.empty(num_slots, dtype=torch.int64, device=device)
        for start in range(0, num_slots, _SLOTS_PER_CHUNK):
            chunk = slice(start, start + _SLOTS_PER_CHUNK)
            best_N[chunk], argmax_N[chunk], lse_N[chunk] = self._walk_vocabulary(hidden_ND[chunk])
        return best_N, argmax_N, lse_N

    def _walk_vocabulary(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
        """Largest logit, its first token and log-sum-exp of each row, from logits held at once."""
        fused = choose_head_stats(hidden_ND.device)
        if fused is not None:
            best_N, argmax_N, lse_N = fused(self.product(hidden_ND), self.transform)
            return best_N, argmax_N, lse_N
        logits_NV = self.logits(hidden_ND)
        best_N, argmax_N = logits_NV.max(dim=-1)
        # In the place of the logits, so that there are never two of this size.
        above_N = logits_NV.sub_(best_N[:, None]).exp_().sum(dim=-1)
        return best_N, argmax_N, above_N.log_() + best_N

    def _block(self, block: slice) -> "TargetHead":
        bias_V = None if self.bias_V is None else self.bias_V[block]
        return replace(self, weight_VD=self.weight_VD[block], bias_V=bias_V)
