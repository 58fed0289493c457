import numpy as np
import pytest
import torch

from engine.config.recipe import load_config
from engine.config.sections import Config, DataSection, TttSection
from engine.data.dataset_stats import VOCAB_SIZES, compute_stats, histogram
from engine.data.documents import Document, DocumentList
from engine.data.packing import collate
from engine.models.eagle3.draft_config import Eagle3Config, derive_draft_config
from engine.models.eagle3.eagle3 import Eagle3
from engine.models.eagle3.flops import StepCounts
from engine.models.training_rows import allowed_rows
from tests.recipes_configs import target_config

STEPS = 4
MAX_TOKENS = 64


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)

    def document():
        turns = [int(length) for length in rng.integers(2, 12, 2 * int(rng.integers(1, 3)))]
        mask = np.concatenate([np.full(length, bool(index % 2)) for index, length in enumerate(turns)])
        ids = (rng.zipf(1.5, len(mask)) % 90).astype(np.int32)
        return Document(ids, mask, tuple(np.cumsum(turns)[1::2].tolist()))

    return DocumentList([document() for _ in range(40)])


@pytest.fixture(scope="module")
def draft() -> Eagle3Config:
    config = load_config(None, ["draft.vocab_size=64"])
    return derive_draft_config(target_config("llama3.1-8b"), config.draft, config.target.aux_layers)


def make(documents, draft, **changes):
    method = Eagle3(Config(ttt=TttSection(steps=STEPS, **changes)))
    return compute_stats(documents, DataSection(max_tokens=MAX_TOKENS), method, draft, seed=0)


@pytest.mark.parametrize("alignment", ["inference", "specforge"])
def test_shares_are_those_of_all_documents_taken_together(documents, draft, alignment):
    stats = make(documents, draft, mask_alignment=alignment)
    allowed_ST = allowed_rows(collate(list(documents)), TttSection(steps=STEPS, mask_alignment=alignment))
    assert stats.rows_S == pytest.approx(allowed_ST.float().mean(1).tolist())
    runs_ST = torch.stack([allowed_ST[step:].any(0) for step in range(STEPS)])
    assert stats.alive_S == pytest.approx(runs_ST.float().mean(1).tolist())
    assert stats.num_tokens == sum(map(len, documents)) and stats.turns.sum() == sum(len(d.turn_ends) for d in documents)


def test_coverage_is_the_share_of_the_most_frequent_tokens(documents, draft):
    stats = make(documents, draft)
    said = np.concatenate([document.input_ids[document.assistant_mask] for document in documents])
    frequent = np.sort(np.bincount(said))[::-1]
    for size in (1, 5, 30):
        assert stats.coverage(size) == pytest.approx(frequent[:size].sum() / len(said))
    assert stats.coverage(max(VOCAB_SIZES) * 99) == 1


def test_the_saving_is_that_of_the_rows_left_out(documents, draft):
    everything = DocumentList([Document(d.input_ids, np.ones(len(d), dtype=bool), (len(d),)) for d in documents])
    little = DocumentList([Document(d.input_ids, np.arange(len(d)) >= len(d) - 3, (len(d),)) for d in documents])
    savings = [make(some, draft).saving for some in (everything, documents, little)]
    assert 1 < savings[0] < savings[1] < savings[2]
    batch = collate(list(documents))
    method = Eagle3(Config(ttt=TttSection(steps=STEPS)))
    counts = method.count_work(batch, method.allowed_rows(batch))
    dense, needed = (method.step_flops(draft, own) for own in (counts.without_compaction(), counts))
    assert dense / needed == pytest.approx(savings[1], rel=1e-3)


def test_without_compaction_every_row_runs_and_the_loss_stays(documents, draft):
    batch = collate(list(documents))
    all_ST = torch.ones(STEPS, batch.num_tokens, dtype=torch.bool)
    dense = StepCounts.needed(batch, all_ST, 1)
    counts = StepCounts.needed(batch, allowed_rows(batch, TttSection(steps=STEPS)), 1)
    without = counts.without_compaction()
    assert (without.rows_S, without.pairs_S, without.prefix_pairs) == (dense.rows_S, dense.pairs_S, dense.prefix_pairs)
    assert (without.num_loss_rows, without.num_learned) == (counts.num_loss_rows, counts.num_learned)


def test_packs_and_their_waste_are_those_of_an_epoch(documents, draft):
    stats = make(documents, draft)
    assert stats.num_packs * MAX_TOKENS >= stats.num_tokens
    assert stats.waste == pytest.approx(1 - stats.num_tokens / (stats.num_packs * MAX_TOKENS))


def test_a_histogram_counts_everything_once():
    bins = histogram(np.array([1.0, 1.0, 2.5, 9.0]), num_bins=4)
    assert [count for *_, count in bins] == [3, 0, 0, 1]
    assert (bins[0][0], bins[-1][1]) == (1, 9)
    assert histogram(np.array([3, 3, 3])) == [(3, 4, 3)]
    assert [count for *_, count in histogram(np.array([0.5, 1.0]), num_bins=2, within=(0, 1))] == [0, 2]
