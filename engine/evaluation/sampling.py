"""Choice of the next token: the most likely one, or one that is drawn.

Speculative decoding leaves the distribution of the reply as it is, whatever is drafted. Its rule
accepts a drafted token x with probability min(1, p(x) / q(x)), and after a rejection draws from the
part of p that q does not cover, with p the target's and q the draft's distribution. Drafted trees
are chosen, not drawn, so q is 1 at the token that is tried: x is accepted with probability p(x), and
after a rejection the next sibling is tried under p without x. That is the same as drawing one token
from p and accepting the child that equals it. One draw per node therefore decides everything.
Source: Leviathan et al. (arXiv:2211.17192); for trees Miao et al., SpecInfer (arXiv:2305.09781).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-3  # below it, logits divided by it overflow

# Maps the target's logits [Q, V] to one token per row, int64 [Q].
TokenChoice = Callable[[Tensor], Tensor]


def most_likely(logits_QV: Tensor) -> Tensor:
    """Return the most likely token of each row, int64 [Q]."""
    return logits_QV.argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """Distribution that tokens are drawn from. The settings apply in this order, as in SGLang and vLLM.

    temperature: divisor of the logits; 0 = take the most likely token.
    top_k: keep the `top_k` most likely tokens; None = all.
    top_p: keep the fewest of the most likely tokens whose probabilities sum to at least `top_p`.
    seed: of the draws.

    Raises ValueError if a setting is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: expected 0 (greedy), or a number from {LEAST_TEMPERATURE} on")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: expected at least 1; leave it out to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected more than 0 and at most 1; 1 keeps all tokens")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits_QV: Tensor) -> Tensor:
        """Return the distribution of each row, fp32 [Q, V]."""
        scaled_QV = logits_QV.float() / self.temperature
        if self.top_k is not None and self.top_k < scaled_QV.shape[-1]:
            best = scaled_QV.topk(self.top_k, dim=-1)
            scaled_QV = torch.full_like(scaled_QV, -torch.inf).scatter_(-1, best.indices, best.values)
        probability_QV = scaled_QV.softmax(-1)
        if self.top_p == 1:
            return probability_QV
        descending = probability_QV.sort(dim=-1, descending=True)
        before_QV = descending.values.cumsum(-1) - descending.values
        kept_QV = descending.values.masked_fill(before_QV >= self.top_p, 0)
        probability_QV = torch.zeros_like(probability_QV).scatter_(-1, descending.indices, kept_QV)
        return probability_QV / probability_QV.sum(-1, keepdim=True)

    def choice(self, device: torch.device) -> TokenChoice:
        """Return a function that chooses tokens. A new one starts its draws at `seed` again."""
        if self.is_greedy:
            return most_likely
        generator = torch.Generator(device).manual_seed(self.seed)

        def draw(logits_QV: Tensor) -> Tensor:
            return torch.multinomial(self.probabilities(logits_QV), 1, generator=generator)[:, 0]

        return draw


GREEDY = Sampling()
