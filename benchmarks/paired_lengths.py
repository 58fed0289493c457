"""Statistics of acceptance lengths that were measured with several seeds on the same prompts.

An acceptance length is a ratio of sums over prompts: tokens by target forwards. A comparison has to
hold for other seeds and for other prompts, so both are random effects, which are crossed because
every seed is measured on every prompt.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GRID_POINTS = 20_001
_LEAST_TERM = 1e-300


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and prompts.

    standard_error: over seeds and prompts. half_width: half of the 95% confidence interval, with
    Student's quantile for `degrees` degrees of freedom.
    """

    mean: float
    standard_error: float
    degrees: float

    @property
    def half_width(self) -> float:
        return students_quantile(self.degrees) * self.standard_error

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - self.half_width, self.mean + self.half_width

    @property
    def is_nonzero(self) -> bool:
        """Whether the 95% interval excludes 0."""
        low, high = self.interval
        return low > 0 or high < 0


def lengths(tokens_SP: Tensor, forwards_SP: Tensor) -> Tensor:
    """Return the acceptance length of each seed, fp64 [S].

    tokens_SP, forwards_SP: tokens and target forwards of every prompt, [seeds, prompts].
    """
    return tokens_SP.double().sum(1) / forwards_SP.double().sum(1)


def influence(tokens_SP: Tensor, forwards_SP: Tensor) -> Tensor:
    """Return values of prompts whose mean over the prompts is the acceptance length of the seed, fp64 [S, P].

    The spread of these values is that of the ratio, to first order.
    Source: Cochran, Sampling Techniques, section 2.11.
    """
    tokens_SP = tokens_SP.double()
    forwards_SP = forwards_SP.double()
    length_S1 = lengths(tokens_SP, forwards_SP)[:, None]
    mean_forwards_S1 = forwards_SP.mean(1, keepdim=True)
    return length_S1 + (tokens_SP - length_S1 * forwards_SP) / mean_forwards_S1


def estimate(values_SP: Tensor) -> Estimate:
    """Return the mean of values over seeds and prompts, with its error over both.

    values_SP: fp64 [S, P], with at least 2 seeds and 2 prompts; for a difference, those of one draft
    minus those of the other, seed by seed and prompt by prompt.

    The variance of the mean is (MS_seeds + MS_prompts - MS_rest) / (S P), from the mean squares of a
    two-way analysis of variance. It is not taken below the larger of the first two terms.
    Degrees of freedom are Satterthwaite's. Source: Searle, Linear Models, chapter 9.
    Raises ValueError if there are fewer seeds or prompts.
    """
    num_seeds, num_prompts = values_SP.shape
    if min(num_seeds, num_prompts) < 2:
        raise ValueError(f"found {num_seeds} seeds and {num_prompts} prompts; the error needs at least 2 of each")
    mean = values_SP.mean()
    seed_S1 = values_SP.mean(1, keepdim=True) - mean
    prompt_1P = values_SP.mean(0, keepdim=True) - mean
    rest_SP = values_SP - mean - seed_S1 - prompt_1P
    degrees = (num_seeds - 1, num_prompts - 1, (num_seeds - 1) * (num_prompts - 1))
    seeds = num_prompts * seed_S1.square().sum().item() / degrees[0]
    prompts = num_seeds * prompt_1P.square().sum().item() / degrees[1]
    rest = rest_SP.square().sum().item() / degrees[2]
    total = max(seeds + prompts - rest, seeds, prompts)
    spread = sum(term**2 / own for term, own in zip((seeds, prompts, rest), degrees, strict=True))
    effective = total**2 / max(spread, _LEAST_TERM)
    error = math.sqrt(total / (num_seeds * num_prompts))
    return Estimate(mean.item(), error, max(1.0, effective))


def students_quantile(degrees: float) -> float:
    """Return the 97.5% quantile of Student's distribution to 0.2%, for any number of degrees of freedom of at least 1.

    With t = sqrt(degrees) tan(angle), the density is proportional to cos(angle) ** (degrees - 1).
    """
    angle_X = torch.linspace(0, math.pi / 2, _GRID_POINTS, dtype=torch.float64)
    density_X = angle_X.cos().clamp_min(0).pow(degrees - 1)
    share_X = torch.cumulative_trapezoid(density_X, angle_X)
    index = int(torch.searchsorted(share_X, 0.95 * share_X[-1]))
    return math.sqrt(degrees) * math.tan(angle_X[index + 1].item())
