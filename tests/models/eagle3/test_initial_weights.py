from dataclasses import replace

import pytest
import torch

from engine.models.eagle3 import initial_weights
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.initial_weights import start_from_target
from tests.tiny import DRAFT_VOCAB, HIDDEN, VOCAB, make_draft


def embedding() -> torch.Tensor:
    """A table whose singular values fall off slowly, so that no direction is negligible."""
    torch.manual_seed(4)
    return torch.randn(VOCAB, HIDDEN) @ torch.diag(0.9 ** torch.arange(HIDDEN)) @ torch.randn(HIDDEN, HIDDEN)


@pytest.mark.parametrize("rows_per_chunk", [1, 40, VOCAB, 16384])
@pytest.mark.parametrize("rank", [8, 20, 28])
def test_the_projection_is_the_best_of_its_rank(rank, rows_per_chunk, monkeypatch):
    monkeypatch.setattr(initial_weights, "ROWS_PER_CHUNK", rows_per_chunk)
    draft = make_draft(hidden_size=rank)
    embed_VD = embedding()
    start_from_target(draft, embed_VD, None)
    directions = draft.embed_projection.weight.detach().double()
    error = (embed_VD.double() - draft.embed(embed_VD).detach().double() @ directions).norm()
    best = torch.linalg.svdvals(embed_VD.double())[rank:].norm()
    torch.testing.assert_close(error, best, rtol=1e-4, atol=0)
    torch.testing.assert_close(directions @ directions.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5)


def test_the_strongest_direction_comes_first():
    draft = make_draft(hidden_size=8)
    embed_VD = embedding()
    start_from_target(draft, embed_VD, None)
    torch.testing.assert_close(
        draft.embed(embed_VD).detach().norm(dim=0), torch.linalg.svdvals(embed_VD)[:8], rtol=1e-3, atol=0
    )


def test_a_wider_draft_keeps_the_whole_embedding():
    draft = make_draft(hidden_size=40)
    embed_VD = embedding()
    start_from_target(draft, embed_VD, None)
    embedded_VD = draft.embed(embed_VD).detach()
    torch.testing.assert_close(embedded_VD @ embedded_VD.T, embed_VD @ embed_VD.T, rtol=1e-3, atol=1e-3)
    assert not embedded_VD[:, HIDDEN:].any()


def test_the_head_is_the_target_s_only_where_widths_agree_and_it_is_given():
    head_UD = torch.randn(DRAFT_VOCAB, HIDDEN)
    for draft, given, taken in (
        (make_draft(), head_UD, True),
        (make_draft(), None, False),
        (make_draft(hidden_size=24), head_UD, False),
    ):
        before = draft.lm_head.weight.detach().clone()
        start_from_target(draft, embedding(), given)
        assert torch.equal(draft.lm_head.weight, head_UD if taken else before)


def test_nothing_else_changes():
    draft = Eagle3Draft(replace(make_draft().config, hidden_size=24))
    before = {name: weight.clone() for name, weight in draft.state_dict().items()}
    start_from_target(draft, embedding(), torch.randn(DRAFT_VOCAB, HIDDEN))
    changed = {name for name, weight in draft.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"embed_projection.weight"}
