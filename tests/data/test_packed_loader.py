import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.data.documents import DocumentList
from engine.data.packed_loader import PackedLoader

MAX_TOKENS = 64


@pytest.fixture
def documents(make_document):
    """97 documents of 3 to 64 tokens; the first token tells which one it is."""
    random = np.random.default_rng(5)
    lengths = random.integers(3, MAX_TOKENS + 1, size=97)
    return [make_document(1, int(length) - 1, first=1000 * index) for index, length in enumerate(lengths)]


@pytest.fixture
def make_loader(documents):
    def make(**changes):
        settings = dict(
            max_tokens=MAX_TOKENS,
            packs_per_batch=2,
            rank=0,
            world_size=3,
            accumulation_steps=2,
            seed=0,
            epochs=2,
            balance_steps=8,
        )
        return PackedLoader(DocumentList(changes.pop("documents", documents)), **settings | changes)

    return make


def contents(batches):
    """The documents that can carry loss in each micro-batch of an item."""
    result = []
    for batch in batches:
        starts = batch.cu_seqlens[:-1].long()
        loud = torch.stack([part.any() for part in batch.assistant_mask_T.split(batch.lengths.tolist())])
        result.append([int(token) // 1000 for token in batch.input_ids_T[starts[loud]]])
    return result


def stream(loader):
    return [contents(batches) for batches, _ in loader]


def test_ranks_share_out_every_document_once_an_epoch(make_loader):
    streams = [stream(make_loader(rank=rank)) for rank in range(3)]
    seen = Counter(document for ranked in streams for step in ranked for batch in step for document in batch)
    assert seen == {document: 2 for document in range(97)}


def test_all_ranks_take_the_same_number_of_micro_batches(make_loader):
    for rank in range(3):
        loader = make_loader(rank=rank)
        assert [len(batches) for batches, _ in loader] == [2] * loader.num_steps


def test_micro_batches_hold_at_most_their_packs(make_loader):
    sizes = [batch.num_tokens for batches, _ in make_loader() for batch in batches]
    assert max(sizes) <= 2 * MAX_TOKENS
    assert np.mean(sizes[:-2]) > 0.9 * 2 * MAX_TOKENS


def test_the_first_epoch_ends_before_the_second_begins(make_loader):
    order = [document for step in stream(make_loader(world_size=1)) for batch in step for document in batch]
    assert sorted(order[:97]) == sorted(order[97:]) == list(range(97))
    assert order[:97] != order[97:]


def test_cutting_over_ranks_does_not_change_the_global_steps(make_loader):
    def global_steps(**cut):
        ranks = [stream(make_loader(rank=rank, **cut)) for rank in range(cut["world_size"])]
        return [sorted(d for ranked in steps for batch in ranked for d in batch) for steps in zip(*ranks, strict=True)]

    assert global_steps(world_size=1, accumulation_steps=6) == global_steps(world_size=3, accumulation_steps=2)


def test_the_last_step_is_filled_up_with_silent_packs(make_loader, documents):
    loaders = [make_loader(documents=documents[:9], epochs=1, rank=rank, world_size=8) for rank in range(8)]
    steps = [list(loader) for loader in loaders]
    assert [len(items) for items in steps] == [1] * 8
    masks = [batch.assistant_mask_T for items in steps for batches, _ in items for batch in batches]
    assert all(mask.numel() > 0 for mask in masks)
    loud = [sum(bool(batch.assistant_mask_T.any()) for batch in batches) for items in steps for batches, _ in items]
    assert min(loud) == 0 < max(loud) == 1, "silent packs are spread evenly over the ranks"
    assert sum(int(mask.sum()) for mask in masks) == sum(int(document.assistant_mask.sum()) for document in documents[:9])


@pytest.mark.parametrize("rank", [0, 2])
def test_resuming_from_any_state_continues_exactly(make_loader, rank):
    items = list(make_loader(rank=rank))
    expected = [contents(batches) for batches, _ in items]
    states = [state for _, state in items]
    for step, state in enumerate(states, start=1):
        resumed = make_loader(rank=rank)
        resumed.load_state(json.loads(json.dumps(state)))
        assert resumed.num_steps == len(items) - step
        continued = list(resumed)
        assert [contents(batches) for batches, _ in continued] == expected[step:]
        assert [state for _, state in continued] == states[step:]


OTHER_CUTS = [
    {"world_size": 6, "accumulation_steps": 1},
    {"world_size": 4},
    {"world_size": 1, "packs_per_batch": 1},
    {"packs_per_batch": 5, "accumulation_steps": 3},
]


@pytest.mark.parametrize("cut", OTHER_CUTS)
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_going_on_with_other_ranks_repeats_and_skips_nothing(make_loader, cut, steps):
    """Then once more with others again, in whichever epoch that is."""
    states = []
    seen = Counter()
    for settings, count in (({}, steps), (cut, 2), ({"world_size": 5}, None)):
        world_size = settings.get("world_size", 3)
        ranks = [make_loader(**settings | {"rank": rank}) for rank in range(world_size)]
        for loader in ranks:
            if states:
                loader.load_state(json.loads(json.dumps(states[-1])))
        items = [list(loader)[:count] for loader in ranks]
        seen.update(document for ranked in items for batches, _ in ranked for batch in contents(batches) for document in batch)
        states += [state for _, state in items[0]]
        assert all([state for _, state in ranked] == [state for _, state in items[0]] for ranked in items)
    assert seen == {document: 2 for document in range(97)}


def test_the_packs_of_a_step_cost_alike(make_loader):
    def spread(balance_steps: int) -> float:
        loaders = [make_loader(rank=rank, balance_steps=balance_steps) for rank in range(3)]
        assistant_tokens = np.array(
            [[[int(b.assistant_mask_T.sum()) for b in batches] for batches, _ in loader] for loader in loaders]
        )
        return float((assistant_tokens.max(0) - assistant_tokens.min(0))[:-1].mean())

    assert spread(8) < 0.7 * spread(0)


def test_more_epochs_continue_after_the_last_real_pack(make_loader):
    items = list(make_loader(world_size=1, epochs=1))
    longer = make_loader(world_size=1, epochs=2)
    longer.load_state(items[-1][1])
    steps = stream(longer)
    assert sorted(d for step in steps for batch in step for d in batch) == list(range(97))
    assert len(steps) == longer.num_steps


def test_another_seed_gives_another_order(make_loader):
    assert stream(make_loader()) == stream(make_loader())
    assert stream(make_loader()) != stream(make_loader(seed=1))


def first_state(loader: PackedLoader) -> dict:
    """The state after one step."""
    return next(iter(loader))[1]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"max_tokens": 65}, {"balance_steps": 3}])
def test_a_state_of_other_settings_is_refused_by_name(make_loader, changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=rf"{name} was \d+, now {value}"):
        make_loader(**changes).load_state(first_state(make_loader()))


def test_a_state_of_other_data_is_refused_by_name(make_loader, documents):
    with pytest.raises(ValueError, match="num_documents was 97, now 96; num_tokens was"):
        make_loader(documents=documents[1:]).load_state(first_state(make_loader()))
    with pytest.raises(ValueError, match="checksum"):
        make_loader(documents=documents[::-1]).load_state(first_state(make_loader()))
    other = documents[0].input_ids + 1
    with pytest.raises(ValueError, match="stream of batches: checksum was"):
        make_loader(documents=[replace(documents[0], input_ids=other), *documents[1:]]).load_state(first_state(make_loader()))


def test_no_documents_are_refused(make_loader):
    with pytest.raises(ValueError, match="no documents"):
        make_loader(documents=[])
