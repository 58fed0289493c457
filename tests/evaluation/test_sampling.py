"""Sampled replies have the target's distribution, whatever is drafted."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.evaluation.decoding import plain_decode, speculative_decode
from engine.evaluation.sampling import Sampling
from engine.models.drafter import ROOT, TokenTree
from engine.target.frozen import FrozenTarget
from tests.drafters import SHAPE, VOCAB

# The largest chi-square that a correct sampler exceeds once in 10,000 seeds, by Wilson and Hilferty; the seeds are fixed.
NORMAL_QUANTILE = 3.72


def largest_chi_square(degrees: int) -> float:
    return degrees * (1 - 2 / (9 * degrees) + NORMAL_QUANTILE * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom; outcomes that are expected fewer than five times are counted together."""
    is_rare = expected < 5
    observed = torch.cat((counts[~is_rare], counts[is_rare].sum()[None]))
    wanted = torch.cat((expected[~is_rare], expected[is_rare].sum()[None]))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    return ((observed - wanted) ** 2 / wanted).sum().item(), len(wanted) - 1


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    """A target of three layers, since thousands of replies are drawn."""
    torch.manual_seed(5)
    config = AutoConfig.for_model("llama", **SHAPE | {"num_hidden_layers": 3})
    return FrozenTarget(AutoModelForCausalLM.from_config(config, dtype=torch.float32), (0, 1))


class FixedDrafter:
    """Drafter that always proposes the same tree."""

    def __init__(self, tree: TokenTree) -> None:
        self.propose = lambda: tree
        self.start = self.extend = lambda token_ids, aux_QA: None


PROMPT = [3, 1, 4]
CHAIN = "chain"
SETTINGS = {
    CHAIN: Sampling(0.7),
    "tree, top-k": Sampling(1.3, top_k=9),
    "tree, top-k and top-p": Sampling(1.0, top_k=20, top_p=0.8),
}


@torch.inference_mode()
def of_next_two(target, sampling: Sampling) -> torch.Tensor:
    """The probability of each second token and of each third token, [2, V]."""
    first_V = sampling.probabilities(target.model(torch.tensor([PROMPT])).logits[0, -1:])[0]
    ids = torch.tensor([[*PROMPT, first] for first in range(VOCAB)])
    second_VV = sampling.probabilities(target.model(ids).logits[:, -1]) * first_V[:, None]
    pairs = torch.tensor([[*PROMPT, first, second] for first in range(VOCAB) for second in range(VOCAB)])
    third_PV = sampling.probabilities(target.model(pairs).logits[:, -1]) * second_VV.flatten()[:, None]
    return torch.stack((second_VV.sum(0), third_PV.sum(0)))


@pytest.mark.parametrize("name", SETTINGS)
def test_drafted_tokens_do_not_change_the_distribution(target, name):
    sampling = SETTINGS[name]
    expected_2V = of_next_two(target, sampling)
    best_V = expected_2V[0].argsort(descending=True).tolist()
    tree = TokenTree.chain(best_V[:2])
    if name != CHAIN:
        tree = TokenTree([*best_V[:8], *best_V[:5], *best_V[2:6]], [ROOT] * 8 + [0] * 5 + [3] * 4)
    num_draws = 900
    counts_2V = torch.zeros(2, VOCAB)
    depths = []
    for seed in range(num_draws):
        own = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)
        reply = speculative_decode(target, FixedDrafter(tree), PROMPT, max_new_tokens=3, eos_ids=(), sampling=own)
        for place in range(2):
            counts_2V[place, reply.token_ids[place + 1]] += 1
        depths.append(reply.accepted_per_forward[0])
    assert depths.count(1) > 30 and depths.count(2) > 3 and depths.count(0) > 30
    other_2V = of_next_two(target, Sampling(sampling.temperature * 2, sampling.top_k, sampling.top_p))
    for counts_V, expected_V in zip(counts_2V, expected_2V, strict=True):
        statistic, degrees = chi_square(counts_V, expected_V * num_draws)
        assert degrees > 5 and statistic < largest_chi_square(degrees)
    statistic, degrees = chi_square(counts_2V[0], other_2V[0] * num_draws)
    assert statistic > largest_chi_square(degrees), "another temperature would be noticed"


def test_settings_keep_the_tokens_that_they_name():
    logits_1V = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])
    softmax_V = logits_1V[0].softmax(-1)
    assert torch.allclose(Sampling(1.0).probabilities(logits_1V)[0], softmax_V)
    assert torch.allclose(Sampling(0.5).probabilities(logits_1V)[0], (2 * logits_1V[0]).softmax(-1))
    kept_V = Sampling(1.0, top_k=2).probabilities(logits_1V)[0]
    assert torch.allclose(kept_V[:2], softmax_V[:2] / softmax_V[:2].sum()) and kept_V[2:].sum() == 0
    kept_V = Sampling(1.0, top_p=float(softmax_V[0]) + 1e-4).probabilities(logits_1V)[0]
    assert torch.allclose(kept_V[:2], softmax_V[:2] / softmax_V[:2].sum()) and kept_V[2:].sum() == 0
    kept_V = Sampling(1.0, top_p=1e-9).probabilities(logits_1V)[0]
    assert kept_V.tolist() == [1, 0, 0, 0, 0]


def test_temperature_0_is_greedy_and_a_seed_gives_one_reply(target):
    greedy = plain_decode(target, [5, 6], 12, ())
    assert plain_decode(target, [5, 6], 12, (), Sampling(0.0, seed=3)).token_ids == greedy.token_ids
    drawn = [plain_decode(target, [5, 6], 12, (), Sampling(1.0, seed=seed)).token_ids for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": 1e-40}, "temperature=1e-40"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**settings)
