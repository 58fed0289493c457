"""Sampled replies have the target's distribution, whatever is drafted."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.evaluation import sampling as sampling_module
from engine.evaluation.decoding import plain_decode, speculative_decode
from engine.evaluation.sampling import Sampling
from engine.models.drafter import ROOT, DraftDistribution, TokenTree
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


SMALL = 6  # tokens of the vocabulary of chains that are drawn
NUM_CHAINS = 1200
EVERY_TOKEN = "all tokens"
DRAWN = {
    EVERY_TOKEN: Sampling(0.7),
    "candidates, top-k": Sampling(1.3, top_k=3),
    "candidates, top-k and top-p": Sampling(1.2, top_k=5, top_p=0.9),
}


class DrawnChains:
    """Chains of two tokens that a draft draws, each given the token before it, for a target that reads one token too.

    logits_VV: the target's after each token. draft: the draft's distribution after each token; it offers all tokens, or
    four candidates. pair_VV: how often the reply began with each pair of tokens. num_first: how often the first token of
    a first chain was accepted.
    """

    def __init__(self, sampling: Sampling, *, every_token: bool) -> None:
        generator = torch.Generator().manual_seed(11)
        self.logits_VV = torch.randn(SMALL, SMALL, generator=generator)
        scores_VV = self.logits_VV + torch.randn(SMALL, SMALL, generator=generator)
        if every_token:
            self.draft = DraftDistribution(scores_VV.softmax(-1))
        else:
            best = scores_VV.topk(4)
            self.draft = DraftDistribution(best.values.softmax(-1), best.indices)
        self.target_VV = sampling.probabilities(self.logits_VV)
        self.pair_VV = torch.zeros(SMALL, SMALL)
        self.num_first = 0
        self._choice = replace(sampling, seed=1).choice(torch.device("cpu"))
        self._generator = torch.Generator().manual_seed(2)

    def run(self) -> "DrawnChains":
        for _ in range(NUM_CHAINS):
            reply = []
            while len(reply) < 2:
                accepted, next_id = self._forward(reply[-1] if reply else 0)
                self.num_first += not reply and len(accepted) > 0
                reply += [*accepted, next_id]
            self.pair_VV[reply[0], reply[1]] += 1
        return self

    def _forward(self, newest_id: int) -> tuple[list[int], int]:
        """Return the accepted tokens and the one after them."""
        q_VV = self.draft.over(SMALL)
        first = int(torch.multinomial(q_VV[newest_id], 1, generator=self._generator))
        second = int(torch.multinomial(q_VV[first], 1, generator=self._generator))
        before = [newest_id, first]
        tokens = self.draft.token_SK
        drawn_from = DraftDistribution(self.draft.probability_SK[before], None if tokens is None else tokens[before])
        tree = TokenTree.chain([first, second], drawn_from)
        path, next_id = self._choice.judge(self.logits_VV[[*before, second]], tree)
        return [tree.token_ids[node] for node in path], next_id

    def expected_VV(self) -> torch.Tensor:
        return NUM_CHAINS * self.target_VV[0][:, None] * self.target_VV

    def statistic(self) -> tuple[float, int]:
        return chi_square(self.pair_VV.flatten(), self.expected_VV().flatten())


@pytest.mark.parametrize("name", DRAWN)
def test_tokens_drawn_by_the_draft_do_not_change_the_distribution(name, monkeypatch):
    chains = DrawnChains(DRAWN[name], every_token=name == EVERY_TOKEN).run()
    statistic, degrees = chains.statistic()
    assert degrees > 5 and statistic < largest_chi_square(degrees)
    assert not chains.pair_VV[chains.expected_VV() == 0].any()
    target_V, draft_V = chains.target_VV[0], chains.draft.over(SMALL)[0]
    overlap = torch.minimum(target_V, draft_V).sum().item()
    deviation = math.sqrt(overlap * (1 - overlap) / NUM_CHAINS)
    assert abs(chains.num_first / NUM_CHAINS - overlap) < NORMAL_QUANTILE * deviation
    as_if_chosen = (target_V * draft_V).sum().item()
    assert abs(as_if_chosen - overlap) > 3 * NORMAL_QUANTILE * deviation, "the rule for chosen tokens would be noticed"
    monkeypatch.setattr(sampling_module, "residual", lambda target_V, draft_V: target_V)
    statistic, degrees = DrawnChains(DRAWN[name], every_token=name == EVERY_TOKEN).run().statistic()
    assert statistic > largest_chi_square(degrees), "another distribution after a rejection would be noticed"


class TargetAsDraft:
    """Drafter that draws chains of three tokens from the target's own distribution."""

    def __init__(self, target: FrozenTarget, sampling: Sampling) -> None:
        self._target = target
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.of_drafts.seed)
        self._token_ids: list[int] = []

    def start(self, token_ids, aux_TA):
        self._token_ids = list(token_ids)

    def extend(self, token_ids, aux_QA):
        self._token_ids += token_ids

    def propose(self) -> TokenTree:
        ids = list(self._token_ids)
        rows = []
        for _ in range(3):
            rows.append(self._sampling.probabilities(self._target.model(torch.tensor([ids])).logits[:, -1]))
            ids.append(int(torch.multinomial(rows[-1], 1, generator=self._generator)))
        return TokenTree.chain(ids[-3:], DraftDistribution(torch.cat(rows)))


def test_a_draft_with_the_distribution_of_the_target_is_accepted_as_a_whole(target):
    replies = []
    for seed in (3, 3, 4):
        sampling = Sampling(1.2, top_k=20, top_p=0.95, seed=seed)
        drafter = TargetAsDraft(target, sampling)
        reply = speculative_decode(target, drafter, PROMPT, max_new_tokens=17, eos_ids=(), sampling=sampling)
        assert reply.accepted_per_forward == [3] * 4
        replies.append(reply.token_ids)
    assert replies[0] == replies[1] != replies[2]


def test_drafts_are_drawn_with_the_temperature_alone_and_seeds_of_their_own():
    settings = Sampling(0.7, top_k=9, top_p=0.5, seed=4)
    drawn = settings.of_drafts
    assert drawn.temperature == 0.7
    assert {drawn.seed} == {settings.of_drafts.seed} and drawn.seed != 4
    assert replace(settings, seed=5).of_drafts.seed != drawn.seed
    for chosen in (Sampling(), replace(settings, top_k=1), replace(settings, greedy_drafts=True)):
        assert chosen.of_drafts is None


def test_distributions_that_differ_by_rounding_leave_tokens_to_draw():
    even_V = torch.full((3,), 1 / 3)
    assert sampling_module.residual(even_V, even_V).tolist() == even_V.tolist()


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
