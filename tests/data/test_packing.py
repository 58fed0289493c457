import numpy as np
import pytest
import torch

from engine.data.packing import alike_steps, collate, pack

MIXES = {  # tokens of a document, the assistant's share, tokens of a pack: what these data sets look like
    "UltraChat": (lambda r, n: r.lognormal(np.log(1000), 0.45, n), lambda r, n: r.normal(0.72, 0.12, n), 4096),
    "ShareGPT": (lambda r, n: r.lognormal(np.log(900), 1.0, n), lambda r, n: r.beta(3, 2, n), 4096),
    "long prompts": (lambda r, n: r.lognormal(np.log(3000), 0.9, n), lambda r, n: r.beta(1.2, 9, n), 16384),
}


def mix(name: str, count: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens of each document, the assistant's among them, and what a pack holds."""
    tokens, share, max_tokens = MIXES[name]
    random = np.random.default_rng(0)
    lengths = np.clip(tokens(random, count), 20, max_tokens).astype(int)
    return lengths, np.maximum(1, lengths * np.clip(share(random, count), 0.01, 0.98)).astype(int), max_tokens


def wait(assistant_tokens_P: np.ndarray, num_ranks: int) -> float:
    """Assistant tokens of the rank that a step waits for, as a multiple of the mean, over steps of a pack a rank."""
    steps = assistant_tokens_P[: len(assistant_tokens_P) // num_ranks * num_ranks].reshape(-1, num_ranks)
    return float(steps.max(1).sum() / steps.mean(1).sum())


@pytest.mark.parametrize("seed", range(20))
def test_every_document_lies_in_exactly_one_pack_that_holds_it(seed):
    random = np.random.default_rng(seed)
    max_tokens = int(random.integers(1, 300))
    lengths = random.integers(1, max_tokens + 1, size=random.integers(1, 6000))
    packs = pack(lengths, random.integers(0, lengths + 1), max_tokens, np.random.default_rng(seed))
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    assert all(1 <= lengths[members].sum() <= max_tokens for members in packs)


def test_packing_follows_the_generator():
    lengths = np.random.default_rng(0).integers(1, 100, size=500)
    first, again, other = (pack(lengths, lengths // 2, 100, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert [members.tolist() for members in first] != [members.tolist() for members in other]


def test_documents_that_fit_exactly_share_a_pack():
    packs = pack(np.array([5, 6, 2, 3]), np.ones(4, dtype=int), 8, np.random.default_rng(0))
    assert sorted(sorted(members.tolist()) for members in packs) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("name", MIXES)
def test_less_than_a_fiftieth_is_wasted(name):
    lengths, assistant_tokens, max_tokens = mix(name, 20_000)
    packs = pack(lengths, assistant_tokens, max_tokens, np.random.default_rng(1))
    assert 1 - lengths.sum() / (len(packs) * max_tokens) < 0.02


@pytest.mark.parametrize("name", MIXES)
def test_ranks_wait_little_for_each_other(name):
    lengths, assistant_tokens, max_tokens = mix(name, 20_000)
    assistant_tokens_P = np.array(
        [assistant_tokens[members].sum() for members in pack(lengths, assistant_tokens, max_tokens, np.random.default_rng(1))]
    )
    for num_ranks in (8, 64):
        order = np.concatenate(list(alike_steps(assistant_tokens_P, 0, num_ranks, 8, np.random.default_rng(2))))
        assert sorted(order.tolist()) == list(range(len(assistant_tokens_P)))
        # a pack of one long document costs what it costs: the last of eight such steps still waits for its dearest
        assert wait(assistant_tokens_P[order], num_ranks) < min(1.35, 1 + 0.5 * (wait(assistant_tokens_P, num_ranks) - 1))


def test_steps_come_as_drawn_if_that_is_asked_for():
    order = np.concatenate(list(alike_steps(np.arange(50)[::-1], 3, 4, 0, np.random.default_rng(0))))
    assert order.tolist() == list(range(50))


def test_a_step_that_was_begun_is_completed_as_drawn():
    assistant_tokens_P = np.random.default_rng(0).integers(0, 1000, 60)
    first, *steps = alike_steps(assistant_tokens_P, 5, 8, 3, np.random.default_rng(0))
    assert first.tolist() == [0, 1, 2]
    whole = [step for step in steps if len(step) == 8]
    for window in (whole[:3], whole[3:6]):
        least, most = (
            sorted(values)
            for values in zip(*((assistant_tokens_P[s].min(), assistant_tokens_P[s].max()) for s in window), strict=True)
        )
        assert all(high <= low for high, low in zip(most, least[1:], strict=False)), "steps of a window do not overlap in cost"


def test_a_document_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="document 1 has 9 tokens, a pack holds 8"):
        pack(np.array([8, 9]), np.array([1, 1]), 8, np.random.default_rng(0))


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
