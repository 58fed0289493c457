"""Choice of the tokens of a block: the most likely ones, or tokens that are drawn."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.models.drafter import DraftDistribution

# Maps scores [N, K] to one token per row, int64 [N]. The second argument holds the tokens that are
# scored, int64 [N, K]; None = all tokens, by their ids.
DraftChoice = Callable[[Tensor, Tensor | None], Tensor]


def most_likely(scores_NK: Tensor, token_NK: Tensor | None) -> Tensor:
    """Return the token with the highest score of each row, int64 [N]."""
    return _picked(scores_NK.argmax(-1), token_NK)


class DrawnTokens:
    """`DraftChoice` that draws from softmax(scores / temperature) and remembers these distributions.

    distributions: of each call, with N rows.
    """

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        self._temperature = temperature
        self._generator = generator
        self.distributions: list[DraftDistribution] = []

    def __call__(self, scores_NK: Tensor, token_NK: Tensor | None) -> Tensor:
        probability_NK = (scores_NK.float() / self._temperature).softmax(-1)
        self.distributions.append(DraftDistribution(probability_NK, token_NK))
        column_N = torch.multinomial(probability_NK, 1, generator=self._generator)[:, 0]
        return _picked(column_N, token_NK)

    def of_one_block(self, num_tokens: int) -> DraftDistribution:
        """Return the distributions of the first tokens of a single block, whose tokens were drawn one after the other."""
        drawn = self.distributions[:num_tokens]
        probability_SK = torch.cat([step.probability_SK for step in drawn])
        tokens = [step.token_SK for step in drawn if step.token_SK is not None]
        return DraftDistribution(probability_SK, torch.cat(tokens) if tokens else None)


def _picked(column_N: Tensor, token_NK: Tensor | None) -> Tensor:
    return column_N if token_NK is None else token_NK.gather(1, column_N[:, None])[:, 0]
