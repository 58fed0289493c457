"""Choice of the next token: the most likely one, or one that is drawn.

Speculative decoding leaves the distribution of the reply as it is, whatever is drafted. Its rule
accepts a drafted token x with probability min(1, p(x) / q(x)), and after a rejection draws from the
part of p that q does not cover, the normalised max(0, p - q), with p the target's and q the draft's
distribution. A token that was drawn from q is accepted with probability sum(min(p, q)) on average.
Most drafts choose their tokens instead of drawing them, so q is 1 at the token that is tried: x is
accepted with probability p(x), and after a rejection the next sibling is tried under p without x.
That is the same as drawing one token from p and accepting the child that equals it. One draw per
node therefore decides everything.
Source: Leviathan et al. (arXiv:2211.17192); for trees Miao et al., SpecInfer (arXiv:2305.09781).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.drafter import DraftSampling, TokenTree

LEAST_TEMPERATURE = 1e-3  # below it, logits divided by it overflow
DRAFT_SEEDS = 1 << 31  # between a prompt's seed and that of its drafts; generators of CPUs use 32 bits of a seed


@dataclass(frozen=True)
class Sampling:
    """Distribution that tokens are drawn from. The settings apply in this order, as in SGLang and vLLM.

    temperature: divisor of the logits; 0 = take the most likely token.
    top_k: keep the `top_k` most likely tokens; None = all.
    top_p: keep the fewest of the most likely tokens whose probabilities sum to at least `top_p`.
    seed: of the draws.
    greedy_drafts: whether drafts take the most likely tokens where they could draw them.

    Raises ValueError if a setting is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    greedy_drafts: bool = False

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

    @property
    def of_drafts(self) -> DraftSampling | None:
        """How drafts draw tokens; None = they take the most likely ones."""
        if self.is_greedy or self.greedy_drafts or self.top_k == 1:
            return None
        return DraftSampling(self.temperature, (self.seed + DRAFT_SEEDS) % (1 << 32))

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

    def choice(self, device: torch.device) -> "TokenChoice":
        """Return the target's choice of tokens. A new one starts its draws at `seed` again."""
        return TokenChoice(self, torch.Generator(device).manual_seed(self.seed))


GREEDY = Sampling()


class TokenChoice:
    """The target's choice of tokens, with draws that continue from call to call."""

    def __init__(self, sampling: Sampling, generator: torch.Generator) -> None:
        self._sampling = sampling
        self._generator = generator

    def __call__(self, logits_QV: Tensor) -> Tensor:
        """Return one token per row, int64 [Q]."""
        if self._sampling.is_greedy:
            return logits_QV.argmax(-1)
        return torch.multinomial(self._sampling.probabilities(logits_QV), 1, generator=self._generator)[:, 0]

    def judge(self, logits_QV: Tensor, tree: TokenTree) -> tuple[list[int], int]:
        """Return the nodes of a tree that are accepted, from the root on, and the token after them.

        logits_QV: the target's after the newest committed token, then after each node.
        """
        if tree.drawn_from is None or self._sampling.is_greedy:
            choices = self(logits_QV).tolist()
            path = tree.accepted(lambda node: choices[node + 1])
            return path, choices[path[-1] + 1 if path else 0]
        assert tree.is_chain, "drafters draw chains only"
        probability_QV = self._sampling.probabilities(logits_QV)
        draft_SV = tree.drawn_from.over(logits_QV.shape[-1]).to(probability_QV)
        num_accepted, next_id = verify_drawn(probability_QV, draft_SV, tree.token_ids, self._generator)
        return list(range(num_accepted)), next_id


def verify_drawn(target_QV: Tensor, draft_SV: Tensor, token_ids: Sequence[int], generator: torch.Generator) -> tuple[int, int]:
    """Apply the rule of acceptance to a chain of drawn tokens.

    target_QV: [S + 1, V], the target's distributions before each token and after the last one.
    draft_SV: the distributions that the tokens were drawn from.
    Returns the number of accepted tokens and the token after them.
    """
    token_S1 = torch.tensor(token_ids, dtype=torch.long, device=target_QV.device)[:, None]
    target_S = target_QV[:-1].gather(1, token_S1)[:, 0]
    draft_S = draft_SV.gather(1, token_S1)[:, 0]
    uniform_S = torch.rand(len(token_ids), generator=generator, device=target_QV.device)
    is_accepted_S = uniform_S * draft_S < target_S
    num_accepted = int(is_accepted_S.long().cumprod(0).sum())
    next_V = target_QV[num_accepted]
    if num_accepted < len(token_ids):
        next_V = residual(next_V, draft_SV[num_accepted])
    return num_accepted, int(torch.multinomial(next_V, 1, generator=generator))


def residual(target_V: Tensor, draft_V: Tensor) -> Tensor:
    """Return the distribution after a rejection, [V]. Its sum need not be 1."""
    excess_V = (target_V - draft_V).clamp_min(0)
    # Rounding can hide the excess of two distributions that are nearly equal.
    return torch.where(excess_V.sum() > 0, excess_V, target_V)
