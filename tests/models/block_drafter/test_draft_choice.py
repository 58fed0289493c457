"""Drawn blocks come from the distributions that they report, which are those of SGLang."""

from dataclasses import replace

import pytest
import torch

from engine.config.tree_shape import TreeShape
from engine.models.block_drafter.draft_choice import DrawnTokens, most_likely
from engine.models.drafter import DraftSampling, TokenTree
from tests.block_drafts import HIDDEN, NUM_AUX, VOCAB, every_token, make_draft, make_method_of, make_tables

STEPS = 3
TEMPERATURE = 0.6
DRAWING = ("dspark", "dflash2")


def serve(name: str):
    method = make_method_of(name)
    draft = make_draft(method).eval().requires_grad_(False)
    return method.serve(draft, make_tables(), every_token())


def scores_after(served, hidden_D: torch.Tensor, previous: int) -> torch.Tensor:
    """The score of each token after another one, [V]; -inf for tokens that are no candidates."""
    model = served.model
    base_V = served.head.weight_VD @ hidden_D
    if hasattr(model, "markov_head"):
        return base_V + model.markov_head.markov_w2.weight @ model.markov_head.markov_w1.weight[previous]
    selector = model.candidate_selector
    state_r = selector.hidden_projection.weight @ hidden_D
    scores_V = base_V + selector.successor_codebook @ (selector.predecessor_codebook[previous] * state_r)
    candidates = base_V.topk(model.config.selector_top_k).indices
    return torch.full_like(base_V, -torch.inf).index_copy(0, candidates, scores_V[candidates])


@pytest.mark.parametrize("name", DRAWING)
def test_tokens_are_drawn_from_the_softmax_of_their_scores(name):
    served = serve(name)
    num_blocks = 4000
    hidden_1SD = 2 * torch.randn(1, STEPS, HIDDEN, generator=torch.Generator().manual_seed(3))
    newest_1 = torch.tensor([7])
    draws = DrawnTokens(TEMPERATURE, torch.Generator().manual_seed(4))
    drawn_NS = torch.tensor(served.choose(hidden_1SD.expand(num_blocks, -1, -1), newest_1.expand(num_blocks), draws))
    assert len(drawn_NS.unique(dim=0)) > 100
    for step in range(STEPS):
        reported_NV = draws.distributions[step].over(VOCAB)
        previous_N = drawn_NS[:, step - 1] if step else newest_1.expand(num_blocks)
        previous = int(previous_N.mode().values)
        is_after_N = previous_N == previous
        expected_V = (scores_after(served, hidden_1SD[0, step], previous) / TEMPERATURE).softmax(-1)
        torch.testing.assert_close(reported_NV[is_after_N], expected_V.expand(int(is_after_N.sum()), -1), rtol=1e-4, atol=1e-6)
        found_V = torch.bincount(drawn_NS[is_after_N, step], minlength=VOCAB) / is_after_N.sum()
        # Five deviations of a share, and one token more.
        bound_V = 5 * (expected_V * (1 - expected_V) / is_after_N.sum()).sqrt() + 1 / is_after_N.sum()
        assert (found_V - expected_V).abs().le(bound_V).all()
        sharper_V = (scores_after(served, hidden_1SD[0, step], previous) / (TEMPERATURE / 2)).softmax(-1)
        assert (found_V - sharper_V).abs().gt(bound_V).any(), "another temperature would be noticed"


def proposals(served, sampling: DraftSampling) -> list[TokenTree]:
    drafter = served.sampling_drafter(TreeShape(STEPS), sampling)
    generator = torch.Generator().manual_seed(5)
    aux_TA = torch.randn(9, NUM_AUX * HIDDEN, generator=generator)
    drafter.start(list(range(10)), aux_TA)
    return [drafter.propose() for _ in range(6)]


@pytest.mark.parametrize("name", DRAWING)
def test_a_seed_gives_one_series_of_proposals(name):
    served = serve(name)
    first, again, other = (proposals(served, DraftSampling(1.5, seed)) for seed in (1, 1, 2))
    assert [tree.token_ids for tree in first] == [tree.token_ids for tree in again]
    assert [tree.token_ids for tree in first] != [tree.token_ids for tree in other]
    assert len({tuple(tree.token_ids) for tree in first}) > 1
    for tree in first:
        assert tree.is_chain and tree.drawn_from.over(VOCAB).shape == (STEPS, VOCAB)
        assert tree.drawn_from.over(VOCAB)[range(STEPS), tree.token_ids].min() > 0
    chosen = proposals(served, DraftSampling(1e-3, 1))
    greedy = served.drafter(TreeShape(STEPS))
    greedy.start(list(range(10)), torch.randn(9, NUM_AUX * HIDDEN, generator=torch.Generator().manual_seed(5)))
    assert list(greedy.propose().token_ids) == list(chosen[0].token_ids)
    assert greedy.propose().drawn_from is None


def test_dflash_takes_the_most_likely_tokens_as_servers_do():
    trees = proposals(serve("dflash"), DraftSampling(1.5, 1))
    assert len({tuple(tree.token_ids) for tree in trees}) == 1 and trees[0].drawn_from is None


def test_a_block_that_ends_early_reports_the_distributions_of_its_tokens():
    trees = proposals(replace(serve("dspark"), min_confidence=0.2), DraftSampling(1.5, 1))
    assert all(len(tree) < STEPS for tree in trees)
    assert all(len(tree.drawn_from.over(VOCAB)) == len(tree) for tree in trees)


def test_the_most_likely_of_some_tokens_is_one_of_them():
    scores_NK = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    token_NK = torch.tensor([[8, 3, 4], [6, 1, 0]])
    assert most_likely(scores_NK, token_NK).tolist() == [3, 6]
    assert most_likely(scores_NK, None).tolist() == [1, 0]
