"""Masks in numbers are Transformers' masks, evaluated on each document's square; what is not known for sure stays a square."""

import json
from functools import partial, wraps

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    chunked_overlay,
    find_packed_sequence_indices,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from engine.models.target_families import CHUNKS_START_WITH_DOCUMENTS
from engine.parallel.rules import PROOFS
from engine.target import masks
from engine.target.masks import DocumentMasks, Reach, document_masks, reach_of, whole_masks
from engine.target.packed_row import PackedRow, row_of_forward
from engine.target.structure import decoder_of
from tests.parallel.families import VOCAB, tiny_model

CPU = torch.device("cpu")
LENGTHS = (5, 1, 13, 2)
UNPADDED = torch.zeros(1, dtype=torch.int64)
POSITION_1T = torch.cat([torch.arange(length) for length in LENGTHS])[None]
PACKED = packed_sequence_mask_function(find_packed_sequence_indices(POSITION_1T))
WINDOW = sliding_window_causal_mask_function(4)
CHUNK = chunked_causal_mask_function(4, UNPADDED)


def squares_of(mask_function, lengths) -> list[torch.Tensor]:
    return list(masks._squares(mask_function, lengths, CPU))


def assert_is_the_mask(reach, mask_function, lengths) -> None:
    for square, length in zip(squares_of(mask_function, lengths), lengths, strict=True):
        assert torch.equal(reach.square(length, CPU), square)


@pytest.fixture
def spied():
    """Mask functions that Transformers makes while `set_attn_implementation("spied")` is on, for its own sdpa."""
    found = []

    def spy(*, mask_function, **arguments):
        found.append(mask_function)
        return masking_utils.sdpa_mask(mask_function=mask_function, **arguments)

    def attend(*arguments, softcap=None, **options):  # sdpa refuses a cap; here its scores matter to nobody
        return sdpa_attention_forward(*arguments, **options)

    AttentionMaskInterface.register("spied", spy)
    AttentionInterface.register("spied", attend)
    return found


@pytest.mark.parametrize("family", json.loads(PROOFS.read_text(encoding="utf-8")))  # test_rules.py: they are all there
@torch.no_grad()
def test_the_masks_of_every_family_are_recognised(family, spied):
    decoder = decoder_of(tiny_model(family))
    decoder.set_attn_implementation("spied")
    for lengths in (LENGTHS, (17,)):
        spied.clear()
        ids_T = torch.cat([3 + torch.randperm(VOCAB - 3)[:length] for length in lengths])
        position_T = torch.cat([torch.arange(length) for length in lengths])
        decoder(input_ids=ids_T[None], position_ids=position_T[None], use_cache=False)
        for mask_function in spied:
            reach = reach_of(mask_function, PackedRow(lengths, CPU))
            if reach is None:  # chunks of the row, before Transformers counted them from a document's start
                assert not CHUNKS_START_WITH_DOCUMENTS
                continue
            assert_is_the_mask(reach, mask_function, lengths)
            if 3 < (reach.window or reach.chunk or 0) < 17:
                assert not torch.equal(reach.square(17, CPU), Reach().square(17, CPU))


KNOWN = {
    "causal": (causal_mask_function, Reach()),
    "window": (WINDOW, Reach(window=4)),
    "packed": (and_masks(causal_mask_function, PACKED), Reach()),
    "packed window": (and_masks(PACKED, and_masks(WINDOW, causal_mask_function)), Reach(window=4)),
    "two windows": (and_masks(WINDOW, sliding_window_overlay(3)), Reach(window=3)),
}
OTHER_POSITIONS_1T = torch.arange(sum(LENGTHS))[None]
UNKNOWN = {
    "no causality": sliding_window_overlay(4),
    "both sides": sliding_window_bidirectional_mask_function(4),
    "either": or_masks(causal_mask_function, WINDOW),
    "an overlay": and_masks(WINDOW, lambda batch, head, query, key: key % 2 == 0),
    "chunks of the row": CHUNK,
    "padding": chunked_causal_mask_function(5, UNPADDED + 1),
    "two chunks": and_masks(chunked_overlay(5, UNPADDED), chunked_overlay(6, UNPADDED), causal_mask_function),
    "other documents": and_masks(causal_mask_function, packed_sequence_mask_function(POSITION_1T)),
    "an object": partial(causal_mask_function),
    "no window at all": and_masks(sliding_window_overlay(0), causal_mask_function),
}


@wraps(causal_mask_function)
def _pretends(batch, head, query, key):
    return (key <= query) & (key % 2 == 0)


UNKNOWN["a pretender"] = _pretends
if CHUNKS_START_WITH_DOCUMENTS:
    remap = masking_utils.remap_positions_for_packed_sequence
    KNOWN["chunk"] = and_masks(PACKED, remap(CHUNK, POSITION_1T)), Reach(chunk=4)
    UNKNOWN["other positions"] = and_masks(PACKED, remap(CHUNK, OTHER_POSITIONS_1T))
    UNKNOWN["fewer positions"] = remap(causal_mask_function, POSITION_1T.repeat(1, 2))


@pytest.mark.parametrize("name", KNOWN)
def test_known_masks_are_numbers(name):
    mask_function, expected = KNOWN[name]
    reach = reach_of(mask_function, PackedRow(LENGTHS, CPU))
    assert reach == expected
    assert_is_the_mask(reach, mask_function, LENGTHS)


@pytest.mark.parametrize("name", UNKNOWN)
def test_masks_that_are_not_known_stay_squares(name, packed_documents):
    found = document_masks(q_length=sum(LENGTHS), mask_function=UNKNOWN[name], device=CPU)
    assert found.reach is None
    for ours, square in zip(found.squares, squares_of(UNKNOWN[name], LENGTHS), strict=True):
        assert torch.equal(ours, square)


def test_chunks_of_the_row_are_chunks_of_documents_that_begin_with_one():
    assert reach_of(CHUNK, PackedRow((8, 4, 7), CPU)) == Reach(chunk=4)
    assert_is_the_mask(Reach(chunk=4), CHUNK, (8, 4, 7))


def test_masks_of_another_meaning_than_we_know_are_not_trusted(monkeypatch):
    def wider(size):
        return sliding_window_causal_mask_function(size + 1)

    monkeypatch.setattr(masking_utils, "sliding_window_causal_mask_function", wider)
    masks._kinds_are_as_known.cache_clear()
    assert reach_of(causal_mask_function, PackedRow(LENGTHS, CPU)) is None
    monkeypatch.undo()
    masks._kinds_are_as_known.cache_clear()
    assert reach_of(causal_mask_function, PackedRow(LENGTHS, CPU)) == Reach()


@pytest.fixture
def packed_documents():
    token = row_of_forward.set(PackedRow(LENGTHS, CPU))
    yield
    row_of_forward.reset(token)


def test_segments_are_documents_cut_at_chunk_borders():
    found = DocumentMasks(LENGTHS, CPU, Reach(window=3, chunk=4)).segments
    assert found.lengths == (4, 1, 1, 4, 4, 4, 1, 2) and found.window == 3
    assert found.cu_seqlens.tolist() == [0, 4, 5, 6, 10, 14, 18, 19, 21] and found.cu_seqlens.dtype == torch.int32
    assert DocumentMasks(LENGTHS, CPU).segments.lengths == LENGTHS


@pytest.mark.parametrize("mask_function", [WINDOW, CHUNK], ids=["numbers", "squares"])
def test_a_document_taken_out_of_whole_masks_is_its_square(mask_function, packed_documents):
    whole = whole_masks(q_length=sum(LENGTHS), mask_function=mask_function, device=CPU)
    for index, square in enumerate(squares_of(mask_function, LENGTHS)):
        added = whole.of((index,))
        assert torch.equal(added == 0, square[None, None]) and (added[added != 0] == torch.finfo(torch.float32).min).all()
    assert torch.equal(whole.of((1, 2)).of((1,))[0, 0] == 0, squares_of(mask_function, LENGTHS)[2])
