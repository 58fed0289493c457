"""Attention inside documents: plain softmax attention under the squares of Transformers' own masks is the reference.

plain_flash.py stands in for flash attention on a CPU.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from engine.batch import PackedBatch
from engine.kernels import choose_packed_attention, flash
from engine.kernels.packed_attention import PackedAttention
from engine.models.target_families import runs_packed
from engine.target import attention, masks
from engine.target.attention import attend_documents, attend_one
from engine.target.frozen import FrozenTarget
from engine.target.masks import DocumentMasks, Reach, added, document_masks
from engine.target.packed_row import PackedRow, row_of_forward
from tests.kernels.plain_flash import PLAIN
from tests.live_bytes import LiveBytes
from tests.parallel.families import VOCAB, tiny_model

CPU = torch.device("cpu")
LENGTHS = (4, 8, 4, 11)
KINDS = ("plain", "softcap", "sinks")
MASKS = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(3),
    "chunk": chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),  # each document begins with one
    "every other key": and_masks(causal_mask_function, lambda batch, head, query, key: (query - key) % 2 == 0),
}
PATHS = {"one call": PackedAttention(PLAIN, ""), "blocks": PackedAttention(None, "")}


@pytest.fixture(autouse=True)
def documents():
    token = row_of_forward.set(PackedRow(LENGTHS, CPU))
    yield
    row_of_forward.reset(token)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setattr(attention, "choose_packed_attention", lambda device, dtype: PATHS[request.param])


def _inputs(kind="plain"):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    options = {"softcap": {"softcap": 1.5}, "sinks": {"s_aux": torch.randn(4)}}.get(kind, {})
    tensors = torch.randn(1, 4, total, 8), torch.randn(1, 2, total, 8), torch.randn(1, 2, total, 12)
    return tensors, {"scaling": 0.3} | options


def _squares(mask_function) -> DocumentMasks:
    return DocumentMasks(LENGTHS, CPU, None, tuple(masks._squares(mask_function, LENGTHS, CPU)))


def _written_out(query, key, value, squares, scaling, softcap=None, s_aux=None):
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    start = 0
    for length, allowed_LL in zip(LENGTHS, squares, strict=True):
        rows = slice(start, start + length)
        head_outputs = []
        for head in range(query.shape[1]):
            scores_LL = query[0, head, rows] @ key[0, head // repeats, rows].T * scaling
            scores_LL = scores_LL if softcap is None else softcap * torch.tanh(scores_LL / softcap)
            weights_LL = scores_LL.exp() * allowed_LL
            sink = 0.0 if s_aux is None else s_aux[head].exp()
            weights_LL = weights_LL / (weights_LL.sum(-1, keepdim=True) + sink)
            head_outputs.append(weights_LL @ value[0, head // repeats, rows])
        outputs.append(torch.stack(head_outputs, dim=1))
        start += length
    return torch.cat(outputs)[None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_softmax_written_out(path, mask, kind):
    tensors, options = _inputs(kind)
    found = document_masks(q_length=sum(LENGTHS), mask_function=MASKS[mask], device=CPU)
    squares = _squares(MASKS[mask])
    assert (found.reach is None) == (mask == "every other key")
    ours, weights = attend_documents(nn.Identity(), *tensors, found, **options)
    assert weights is None and ours.shape == (1, sum(LENGTHS), 4, 12) and ours.is_contiguous()
    torch.testing.assert_close(ours, _written_out(*tensors, squares.squares, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reach", [Reach(), Reach(window=3), Reach(chunk=4), Reach(3, 4), Reach(window=50), Reach(chunk=50)])
def test_numbers_attend_as_their_squares(path, reach, kind):
    tensors, options = _inputs(kind)
    squares = tuple(reach.square(length, CPU) for length in LENGTHS)
    ours, _ = attend_documents(nn.Identity(), *tensors, DocumentMasks(LENGTHS, CPU, reach), **options)
    under_squares, _ = attend_documents(nn.Identity(), *tensors, DocumentMasks(LENGTHS, CPU, None, squares), **options)
    torch.testing.assert_close(ours, under_squares)


def test_one_document_attends_under_a_mask_of_its_familys_making():
    tensors, options = _inputs("sinks")
    tensors = [x[:, :, :4] for x in tensors]
    allowed_LL = MASKS["every other key"](None, None, torch.arange(4)[:, None], torch.arange(4)[None, :])
    ours, _ = attend_one(nn.Identity(), *tensors, allowed_LL[None, None], **options)
    added, _ = attend_one(nn.Identity(), *tensors, torch.zeros(1, 1, 4, 4).masked_fill(~allowed_LL, -3.4e38), **options)
    whole = DocumentMasks((4,), CPU, None, (allowed_LL,))
    expected, _ = attend_documents(nn.Identity(), *tensors, whole, **options)
    assert torch.equal(ours, expected) and torch.equal(added, expected)


def test_one_document_attends_under_a_mask_and_a_bias_a_head():
    tensors, options = _inputs("sinks")
    query, key, value = (x[:, :, :4] for x in tensors)
    generator = torch.Generator().manual_seed(2)
    bias_HLL = torch.randn(query.shape[1], 4, 4, generator=generator)
    causal_LL = torch.ones(4, 4, dtype=torch.bool).tril()
    scores_HLL = query[0] @ key[0].repeat_interleave(query.shape[1] // key.shape[1], 0).mT
    scores_HLL = (scores_HLL * options["scaling"] + bias_HLL).masked_fill(~causal_LL, -torch.inf)
    sinks_HL1 = options["s_aux"].view(-1, 1, 1).expand(-1, 4, 1)
    weights_HLL = torch.cat([scores_HLL, sinks_HL1], -1).softmax(-1)[..., :4]
    expected_HLE = weights_HLL @ value[0].repeat_interleave(query.shape[1] // value.shape[1], 0)
    mask = added(causal_LL, torch.float32)
    for mask_1HLL, beside in (((mask + bias_HLL)[None], {}), (mask[None, None], {"position_bias": bias_HLL[None]})):
        attended, _ = attend_one(nn.Identity(), query, key, value, mask_1HLL, **options, **beside)
        torch.testing.assert_close(attended[0].transpose(0, 1), expected_HLE)


def test_a_document_reads_the_blocks_that_its_indexer_names_for_each_key_head():
    tensors, options = _inputs()
    query, key, value = (x[:, :, :5] for x in tensors)
    groups = key.shape[1]
    blocks = [[[0, -1]] * 2 + [[1, 0]] * 2 + [[2, -1]], [[0, -1]] * 2 + [[1, -1]] * 2 + [[2, 0]]]
    module = nn.Identity()
    module.indexer = nn.Identity()
    module.indexer.block_size = 2
    causal_LL = torch.ones(5, 5, dtype=torch.bool).tril()
    ours, _ = attend_one(
        module, query, key, value, added(causal_LL, torch.float32)[None, None], block_indices=torch.tensor([blocks]), **options
    )
    assert groups == 2
    for group, named in enumerate(blocks):
        allowed_LL = causal_LL & torch.tensor([[column // 2 in row for column in range(5)] for row in named])
        heads = slice(group * query.shape[1] // groups, (group + 1) * query.shape[1] // groups)
        one = (query[:, heads], key[:, group : group + 1], value[:, group : group + 1])
        expected, _ = attend_documents(nn.Identity(), *one, DocumentMasks((5,), CPU, None, (allowed_LL,)), **options)
        torch.testing.assert_close(ours[:, :, heads], expected)


def test_what_would_change_the_result_is_refused():
    tensors, _ = _inputs()
    with pytest.raises(ValueError, match="position_bias"):
        attend_documents(nn.Identity(), *tensors, DocumentMasks(LENGTHS, CPU), position_bias=torch.ones(1))
    with pytest.raises(ValueError, match="mask of type Tensor"):
        attend_documents(nn.Identity(), *tensors, torch.ones(1, 1, 24, 24))


# Sinks and windows, soft-caps and windows, latent keys wider than values, chunks, a window in the mask alone.
FAMILIES = ("gpt_oss", "gemma2", "deepseek_v3", "llama4_text", "phi3")
TARGET_LENGTHS = (13, 1, 17, 5)


def _target(family):
    return FrozenTarget(tiny_model(family), (0, 1, 2))


def _states(target, spoil=lambda segments, scores: (segments, scores), flash_attention=PLAIN):
    def spoiled(query, key, value, segments, scores):
        return PackedAttention(flash_attention, "")(query, key, value, *spoil(segments, scores))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "choose_packed_attention", lambda device, dtype: spoiled)
        ids_T = 3 + torch.randint(VOCAB - 3, (sum(TARGET_LENGTHS),), generator=torch.Generator().manual_seed(0))
        cu_seqlens = torch.tensor((0, *TARGET_LENGTHS)).cumsum(0).to(torch.int32)
        return target(PackedBatch(ids_T, torch.ones_like(ids_T, dtype=torch.bool), cu_seqlens), torch.arange(len(ids_T))).aux_TA


def _under_squares(target):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "reach_of", lambda *arguments, **options: None)
        return _states(target)


def _error(ours, expected):
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_give_what_they_give_under_squares(family):
    target = _target(family)
    if not runs_packed(target.config):
        pytest.skip("this Transformers counts chunks from the row's start")
    expected = _under_squares(target)
    assert 0 < _error(_states(target), expected) < 1e-5
    assert _error(_states(target, flash_attention=None), expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "part", "taken"),
    [
        ("gpt_oss", 0, {"window": None}),
        ("gpt_oss", 1, {"sinks_H": None}),
        ("gemma2", 0, {"window": None}),
        ("gemma2", 1, {"softcap": None}),
        ("phi3", 0, {"window": None}),
        ("llama4_text", 0, {"lengths": TARGET_LENGTHS}),
        ("deepseek_v3", 0, {"lengths": (sum(TARGET_LENGTHS),)}),
    ],
)
def test_what_is_taken_away_is_missed(family, part, taken):
    target = _target(family)
    if not runs_packed(target.config):
        pytest.skip("this Transformers counts chunks from the row's start")
    expected = _under_squares(target)

    def without(*parts):
        return [replace(one, **taken) if index == part else one for index, one in enumerate(parts)]

    # gemma2's scores are capped at 50, far above a tiny model's
    assert _error(_states(target, without), expected) > (1e-6 if "softcap" in taken else 1e-2)


def test_queries_that_are_not_scaled_by_their_place_are_missed(monkeypatch):
    target = _target("llama4_text")
    if not runs_packed(target.config):
        pytest.skip("this Transformers counts chunks from the row's start")
    expected = _states(target)
    monkeypatch.setattr(attention, "tuned_queries", lambda module, query, position_T: query)
    assert _error(_states(target), expected) > 1e-3
    assert all(layer.self_attn.attn_temperature_tuning for layer in target.decoder.layers)  # for forwards with a cache


@pytest.mark.parametrize("family", ["gemma3_text", "phi3"])
def test_a_long_document_makes_no_square(family):
    target = _target(family)
    length = 4096
    ids_T = 3 + torch.randint(VOCAB - 3, (length,))
    batch = PackedBatch(ids_T, torch.ones_like(ids_T, dtype=torch.bool), torch.tensor([0, length], dtype=torch.int32))
    with LiveBytes() as live:
        target(batch, torch.arange(2))
    assert live.peak < length * length  # bytes of a mask of bool


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gemma2", "phi3"])  # of no experts, which rounding may choose among
def test_on_a_gpu_targets_give_what_they_give_under_squares(family):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    reason = flash.refusal(torch.bfloat16, device)
    if reason is not None:
        pytest.skip(reason)
    target = _target(family)
    exact = _under_squares(target)
    target.model.to(device, torch.bfloat16)
    plain = _under_squares(target).cpu()
    found = choose_packed_attention(device, torch.bfloat16).flash
    ours = _states(target, flash_attention=found).cpu()
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()
