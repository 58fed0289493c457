"""Attention inside documents: plain softmax attention, written out, is the reference."""

import pytest
import torch
from torch import nn
from transformers.masking_utils import causal_mask_function, chunked_causal_mask_function, sliding_window_causal_mask_function

from engine.target import attention
from engine.target.attention import DocumentMasks, attend_documents, document_masks

LENGTHS = (5, 1, 11)
MASKS = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(3),
    "chunk": chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.int64)),
}


@pytest.fixture(autouse=True)
def documents():
    token = attention._lengths.set(LENGTHS)
    yield
    attention._lengths.reset(token)


def _inputs(heads=4, groups=2, value_dim=8):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    return torch.randn(1, heads, total, 8), torch.randn(1, groups, total, 8), torch.randn(1, groups, total, value_dim)


def _written_out(query, key, value, masks, scale, softcap, sinks_H):
    repeats, outputs, start = query.shape[1] // key.shape[1], [], 0
    for length, allowed_LL in zip(LENGTHS, masks.allowed_LL, strict=True):
        if allowed_LL is None:
            allowed_LL = torch.ones(length, length).tril().bool()
        rows, head_outputs = slice(start, start + length), []
        for head in range(query.shape[1]):
            scores_LL = query[0, head, rows] @ key[0, head // repeats, rows].T * scale
            scores_LL = scores_LL if softcap is None else softcap * torch.tanh(scores_LL / softcap)
            weights_LL = scores_LL.exp() * allowed_LL
            sink = 0.0 if sinks_H is None else sinks_H[head].exp()
            weights_LL = weights_LL / (weights_LL.sum(-1, keepdim=True) + sink)
            head_outputs.append(weights_LL @ value[0, head // repeats, rows])
        outputs.append(torch.stack(head_outputs, dim=1))
        start += length
    return torch.cat(outputs)[None]


@pytest.mark.parametrize("max_scores", [1 << 26, 50])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_softmax_written_out(mask, kind, max_scores, monkeypatch):
    monkeypatch.setattr(attention, "_MAX_SCORES", max_scores)
    query, key, value = _inputs(value_dim=12)
    masks = document_masks(q_length=sum(LENGTHS), mask_function=MASKS[mask], device=query.device)
    softcap = 1.5 if kind == "softcap" else None
    sinks_H = torch.randn(4) if kind == "sinks" else None
    ours, weights = attend_documents(nn.Identity(), query, key, value, masks, scaling=0.3, softcap=softcap, s_aux=sinks_H)
    assert weights is None
    assert ours.shape == (1, sum(LENGTHS), 4, 12)
    torch.testing.assert_close(ours, _written_out(query, key, value, masks, 0.3, softcap, sinks_H))


def test_plainly_causal_documents_carry_no_mask():
    masks = document_masks(q_length=17, mask_function=MASKS["window"], device=torch.device("cpu"))
    assert [mask is None for mask in masks.allowed_LL] == [False, True, False]
    masks = document_masks(q_length=17, mask_function=MASKS["causal"], device=torch.device("cpu"))
    assert masks == DocumentMasks(LENGTHS, (None, None, None))


def test_what_would_change_the_result_is_refused():
    query, key, value = _inputs()
    masks = document_masks(q_length=17, mask_function=MASKS["causal"], device=query.device)
    with pytest.raises(ValueError, match="position_bias"):
        attend_documents(nn.Identity(), query, key, value, masks, position_bias=torch.ones(1))
    with pytest.raises(ValueError, match="mask of type Tensor"):
        attend_documents(nn.Identity(), query, key, value, torch.ones(1, 1, 17, 17))
