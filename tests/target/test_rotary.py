"""Documents of a packed row have the rotary embeddings that each has alone."""

import pytest
import torch

from engine.batch import PackedBatch
from engine.target import frozen
from engine.target.frozen import FrozenTarget, capture
from tests.parallel.families import VOCAB, tiny_model

LENGTHS, AUX = (9, 3, 1, 12, 6), (0, 1, 2)  # both long and short beside the 6 tokens of pretraining
FAMILIES = ("phimoe", "phi4_multimodal")


def _batch() -> PackedBatch:
    ids_T = 3 + torch.randint(VOCAB - 3, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor((0, *LENGTHS)).cumsum(0).int()
    return PackedBatch(ids_T, torch.ones_like(ids_T, dtype=torch.bool), cu_seqlens)


@torch.no_grad()
def _one_by_one(family: str) -> torch.Tensor:
    model = tiny_model(family)
    states = []
    for ids_L in _batch().input_ids_T.split(LENGTHS):
        with capture(model, AUX) as seen:
            model(input_ids=ids_L[None], use_cache=False)
        states.append(seen.aux()[0])
    return torch.cat(states)


def _error(family: str) -> float:
    target = FrozenTarget(tiny_model(family), AUX)
    expected = _one_by_one(family)
    assert target.packs
    ours = target(_batch(), torch.arange(2)).aux_TA
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_document_has_the_factors_of_its_own_length(family):
    assert _error(family) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_of_the_longest_document_are_missed(family, monkeypatch):
    monkeypatch.setattr(frozen, "rotate_by_length", lambda decoder: None)
    assert _error(family) > 1e-2


def test_forwards_of_one_document_choose_by_its_own_length():
    target = FrozenTarget(tiny_model("phimoe"), AUX).model
    model = tiny_model("phimoe")
    for ids_L in _batch().input_ids_T.split(LENGTHS):
        with torch.no_grad():
            ours, expected = (one(input_ids=ids_L[None], use_cache=False).logits for one in (target, model))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
