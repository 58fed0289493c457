import numpy as np
import pytest
import torch

from engine.data.packing import OPEN_PACKS, collate, pack


@pytest.mark.parametrize("seed", range(20))
def test_every_document_lies_in_exactly_one_pack_that_holds_it(seed):
    random = np.random.default_rng(seed)
    max_tokens = int(random.integers(1, 300))
    lengths = random.integers(1, max_tokens + 1, size=random.integers(1, 2000))
    packs = pack(lengths, max_tokens, random.permutation(len(lengths)))
    assert sorted(document for members in packs for document in members) == list(range(len(lengths)))
    assert all(1 <= lengths[members].sum() <= max_tokens for members in packs)


def test_packing_follows_the_order_given():
    random = np.random.default_rng(0)
    lengths, order = random.integers(1, 100, size=500), random.permutation(500)
    assert pack(lengths, 100, order) == pack(lengths.tolist(), 100, order.tolist())
    assert pack(lengths, 100, order) != pack(lengths, 100, random.permutation(500))
    assert pack(lengths, 100, order)[0][0] == order[0]


def test_documents_that_fit_exactly_share_a_pack():
    assert pack([5, 6, 2, 3], 8, [0, 1, 2, 3]) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("max_tokens", [1024, 4096])
def test_less_than_a_twentieth_is_wasted_on_chat_lengths(max_tokens):
    random = np.random.default_rng(1)
    lengths = np.clip(random.lognormal(5.5, 1.0, size=40_000), 3, max_tokens).astype(int)
    packs = pack(lengths, max_tokens, random.permutation(len(lengths)))
    assert len(packs) > 2 * OPEN_PACKS
    assert 1 - lengths.sum() / (len(packs) * max_tokens) < 0.05


def test_a_document_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="document 1 has 9 tokens, a pack holds 8"):
        pack([8, 9], 8, [0, 1])


def test_collate_lays_documents_end_to_end(make_document):
    batch = collate([make_document(2, 3), make_document(1, first=40), make_document(2, 1, first=50)])
    assert batch.input_ids_T.tolist() == [0, 1, 2, 3, 4, 40, 50, 51, 52]
    assert batch.assistant_mask_T.tolist() == [False, False, True, True, True, False, False, False, True]
    assert batch.cu_seqlens.tolist() == [0, 5, 6, 9]
    assert (batch.input_ids_T.dtype, batch.assistant_mask_T.dtype) == (torch.int64, torch.bool)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.position_T.tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2]


def test_collate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one document"):
        collate([])
