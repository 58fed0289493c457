"""The selector adds to a candidate's logit what its formula says."""

import torch

from engine.models.dflash2.candidate_selector import CandidateSelector

VOCAB, HIDDEN, RANK = 20, 6, 3


def make() -> CandidateSelector:
    torch.manual_seed(0)
    selector = CandidateSelector(VOCAB, HIDDEN, RANK).double()
    for parameter in selector.parameters():
        parameter.data.normal_()
    return selector


def test_scores_are_logits_and_a_product_of_three_vectors():
    selector = make()
    logits_QK = torch.randn(4, 5, dtype=torch.float64)
    candidate_QK = torch.randint(VOCAB, (4, 5))
    previous_Q = torch.randint(VOCAB, (4,))
    hidden_QD = torch.randn(4, HIDDEN, dtype=torch.float64)
    found_QK = selector.scores(logits_QK, candidate_QK, previous_Q, hidden_QD)
    for row in range(4):
        state_r = selector.hidden_projection.weight @ hidden_QD[row]
        query_r = selector.predecessor_codebook[previous_Q[row]] * state_r
        for column in range(5):
            added = query_r @ selector.successor_codebook[candidate_QK[row, column]]
            torch.testing.assert_close(found_QK[row, column], logits_QK[row, column] + added)


def test_the_scores_of_all_tokens_are_those_of_candidates():
    selector = make()
    previous_Q = torch.randint(VOCAB, (4,))
    hidden_QD = torch.randn(4, HIDDEN, dtype=torch.float64)
    every_QK = torch.arange(VOCAB).expand(4, -1)
    expected_QV = selector.scores(torch.zeros(4, VOCAB, dtype=torch.float64), every_QK, previous_Q, hidden_QD)
    found_QV = selector.all_scores(previous_Q, hidden_QD)
    torch.testing.assert_close(found_QV, expected_QV.float(), rtol=1e-5, atol=1e-5)


def test_a_new_selector_changes_nothing():
    selector = CandidateSelector(VOCAB, HIDDEN, RANK)
    logits_QK = torch.randn(4, 5)
    scores_QK = selector.scores(
        logits_QK, torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), torch.randn(4, 6)
    )
    assert torch.equal(scores_QK, logits_QK)
