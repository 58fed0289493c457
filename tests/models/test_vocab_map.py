import pytest
import torch

from engine.models.vocab_map import VocabMap


def counts(vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, (vocab,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 17, 49, 50])
@pytest.mark.parametrize("seed", range(3))
def test_tables_keep_the_checkpoint_s_invariants(size, seed):
    vocab_map = VocabMap.most_frequent(counts(seed=seed), size)
    d2t = vocab_map.d2t
    t2d = vocab_map.in_draft_V
    assert (d2t.dtype, d2t.shape, t2d.dtype, t2d.shape) == (torch.int64, (size,), torch.bool, (50,))
    assert torch.equal(t2d.nonzero().flatten(), d2t + torch.arange(size))
    assert torch.equal(vocab_map.target_ids_U, d2t + torch.arange(size))
    assert vocab_map.size == size


@pytest.mark.parametrize("size", [1, 5, 17, 40])
def test_the_most_frequent_are_chosen_and_ties_go_to_the_lower_id(size):
    counts_V = counts()
    ranked = sorted(range(50), key=lambda token: (-counts_V[token].item(), token))
    assert VocabMap.most_frequent(counts_V, size).target_ids_U.tolist() == sorted(ranked[:size])


def test_tokens_never_seen_fill_up_from_the_lowest_id():
    counts_V = torch.zeros(9, dtype=torch.int64).index_fill(0, torch.tensor([4, 7]), 3)
    assert VocabMap.most_frequent(counts_V, 5).target_ids_U.tolist() == [0, 1, 2, 4, 7]


def test_tokens_that_the_template_needs_are_always_there():
    counts_V = torch.arange(9)
    assert VocabMap.most_frequent(counts_V, 4, always=[1, 0, 1, 99]).target_ids_U.tolist() == [0, 1, 7, 8]
    with pytest.raises(ValueError, match="draft.vocab_size=1 is less than the template's 2 special tokens"):
        VocabMap.most_frequent(counts_V, 1, always=[1, 0])


def test_tables_of_a_checkpoint_give_the_map_back():
    vocab_map = VocabMap.most_frequent(counts(), 23)
    again = VocabMap.from_tables(vocab_map.d2t, vocab_map.in_draft_V)
    assert torch.equal(again.target_ids_U, vocab_map.target_ids_U)
    assert torch.equal(again.in_draft_V, vocab_map.in_draft_V)


def test_tables_that_disagree_are_refused():
    vocab_map = VocabMap.most_frequent(counts(), 23)
    shifted = vocab_map.d2t.clone()
    flags = vocab_map.in_draft_V.clone()
    shifted[-1] += 1
    flags[vocab_map.target_ids_U[3]] = False
    for d2t, t2d in ((shifted, vocab_map.in_draft_V), (vocab_map.d2t, flags), (vocab_map.target_ids_U, vocab_map.in_draft_V)):
        with pytest.raises(ValueError, match="different draft vocabularies"):
            VocabMap.from_tables(d2t, t2d)


def test_a_draft_vocabulary_larger_than_the_target_s_is_refused():
    with pytest.raises(ValueError, match="draft.vocab_size=51 exceeds the target's vocabulary of 50"):
        VocabMap.most_frequent(counts(), 51)


def test_coverage_is_the_share_of_counted_tokens():
    vocab_map = VocabMap.most_frequent(torch.tensor([6, 0, 3, 1]), 2)
    assert vocab_map.coverage(torch.tensor([6, 0, 3, 1])) == pytest.approx(0.9)
    assert vocab_map.coverage(torch.tensor([0, 5, 0, 0])) == 0
    assert vocab_map.coverage(torch.zeros(4, dtype=torch.int64)) == 0
