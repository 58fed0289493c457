"""Anchors depend on seed, epoch and document alone, and lie where a block learns what it meets when serving."""

from dataclasses import replace

import pytest
import torch

from engine.batch import PackedBatch
from engine.config.recipe import load_config
from engine.models.block_drafter.anchors import AnchorRule
from engine.models.method_registry import make_method
from tests.block_drafts import make_batch, make_method_of

LENGTHS = (40, 9, 31, 64)
IDS = (7, 3, 11, 2)


def anchors_by_document(rule: AnchorRule, batch: PackedBatch) -> dict[int, list[int]]:
    drawn_T = rule.rows(batch).any(0)
    parts = drawn_T.split(batch.host_lengths)
    return {index: (part.nonzero().flatten() + 1).tolist() for index, part in zip(batch.document_ids, parts, strict=True)}


def one_by_one(batch: PackedBatch) -> list[PackedBatch]:
    bounds = batch.cu_seqlens.tolist()
    parts = []
    for index, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        epochs = batch.document_epochs[index : index + 1]
        cu_seqlens = torch.tensor([0, end - start], dtype=torch.int32)
        own = batch.document_ids[index : index + 1], epochs
        parts.append(PackedBatch(batch.input_ids_T[start:end], batch.assistant_mask_T[start:end], cu_seqlens, *own))
    return parts


@pytest.mark.parametrize("is_sweep", [False, True])
def test_the_draw_of_a_document_does_not_depend_on_its_pack(is_sweep):
    rule = AnchorRule(4, share=0.2, is_sweep=is_sweep, seed=5)
    batch = replace(make_batch(LENGTHS, document_ids=IDS), document_epochs=(1, 1, 2, 1))
    alone: dict[int, list[int]] = {}
    for part in one_by_one(batch):
        alone |= anchors_by_document(rule, part)
    assert anchors_by_document(rule, batch) == alone
    assert any(alone.values())


def test_epochs_and_seeds_draw_differently():
    batch = make_batch(LENGTHS, document_ids=IDS)
    rule = AnchorRule(4, share=0.2)
    first = anchors_by_document(rule, batch)
    assert anchors_by_document(rule, replace(batch, document_epochs=(1,) * 4)) != first
    assert anchors_by_document(replace(rule, seed=1), batch) != first


def test_the_number_of_anchors_is_the_share_of_a_documents_tokens_on_average():
    batch = make_batch((64,) * 200, document_ids=tuple(range(200)))
    num_anchors = int(AnchorRule(4, share=0.15).rows(batch).any(0).sum())
    # The share of each document is 9.6; its fraction is rounded at random, with a deviation of 0.49 per document.
    assert abs(num_anchors - 200 * 9.6) < 4 * 0.49 * 200**0.5


@pytest.mark.parametrize("is_sweep", [False, True])
def test_a_share_of_the_positions_does_not_count_those_that_cannot_start_a_block(is_sweep):
    batch = make_batch((64,) * 200, document_ids=tuple(range(200)))
    rule = AnchorRule(4, share=0.3, share_of="positions", is_sweep=is_sweep)
    num_possible = int(rule.possible_rows(batch).any(0).sum())
    assert num_possible < 200 * 45, "a third of each document is its prompt"
    num_anchors = int(rule.rows(batch).any(0).sum())
    assert abs(num_anchors - 0.3 * num_possible) < 4 * 0.5 * 200**0.5


def test_short_documents_get_anchors_too():
    batch = make_batch((9,) * 300, document_ids=tuple(range(300)))
    num_anchors = int(AnchorRule(2, share=0.05).rows(batch).any(0).sum())
    assert abs(num_anchors - 300 * 0.45) < 4 * 0.5 * 300**0.5


def test_a_sweep_takes_every_position_once_before_any_twice():
    batch = make_batch((40,), document_ids=(3,))
    rule = AnchorRule(3, share=0.1, is_sweep=True)
    possible = set((rule.possible_rows(batch).any(0).nonzero().flatten() + 1).tolist())
    taken: list[int] = []
    epoch = 0
    while len(taken) + 4 <= len(possible):
        own = anchors_by_document(rule, replace(batch, document_epochs=(epoch,)))[3]
        assert not set(own) & set(taken)
        taken += own
        epoch += 1
    assert set(taken) <= possible
    assert len(possible) - len(taken) < 4


def test_rows_are_those_that_occur_when_serving():
    batch = make_batch(LENGTHS)
    rows_ST = AnchorRule(4).rows(batch)
    mask_T = batch.assistant_mask_T
    bounds = batch.cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        for position in range(start, end):
            for prediction in range(4):
                label = position + 2 + prediction
                is_reply = label < end and bool(mask_T[position + 1 : label + 1].all())
                assert rows_ST[prediction, position] == is_reply


def test_without_prefixes_rows_behind_a_gap_learn_too():
    batch = make_batch((40,))
    rows_ST = AnchorRule(4, needs_prefix=False).rows(batch)
    with_prefix_ST = AnchorRule(4).rows(batch)
    assert (with_prefix_ST <= rows_ST).all()
    gap = 20
    behind_gap = rows_ST[3, gap - 3]  # the anchor is two tokens before the gap, the label one behind it
    assert not with_prefix_ST[3, gap - 3]
    assert behind_gap


def test_labels_may_cross_documents_only_if_asked_to():
    batch = make_batch((12, 12))
    batch = replace(batch, assistant_mask_T=torch.ones(24, dtype=torch.bool))
    assert not AnchorRule(4, needs_prefix=False).rows(batch)[:, 11].any()
    crossing_ST = AnchorRule(4, needs_prefix=False, stays_in_document=False).rows(batch)
    assert crossing_ST[3, 8]
    assert not AnchorRule(4, needs_prefix=False).rows(batch)[3, 8]


def test_a_share_of_the_positions_replaces_the_number_per_pack():
    for anchors in (64, None, "all"):
        rule = make_method_of("dflash", anchors=anchors, anchor_share=0.25).anchors
        assert (rule.share, rule.share_of) == (0.25, "positions")
    rule = make_method_of("dflash", anchors=16).anchors
    assert (rule.share, rule.share_of) == (16 / 64, "tokens")


def test_all_and_null_start_a_block_at_every_position():
    for text in ("all", "null"):
        recipe = load_config(None, ["draft.method=dflash", f"block.anchors={text}"])
        rule = make_method(recipe).anchors
        batch = make_batch((40, 12))
        assert rule.share is None
        assert torch.equal(rule.rows(batch), rule.possible_rows(batch))
