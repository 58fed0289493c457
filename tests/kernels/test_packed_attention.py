"""Attention in segments of a packed row, written out in float64, is the reference of flash attention in one call and of blocks.

plain_flash.py stands in for flash attention on a CPU.
"""

from dataclasses import replace

import pytest
import torch

from engine.kernels import packed_attention
from engine.kernels.packed_attention import PackedAttention, Scores, Segments, in_blocks
from tests.kernels.plain_flash import PLAIN, plain_forward
from tests.live_bytes import LiveBytes
from tests.pairwise import pairwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (5, 1, 131, 17, 1, 2)
WINDOWS = {"causal": None, "itself": 1, "window": 4, "long window": 100, "wider than all": 500}
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (3, 1)}
WIDTHS = {"equal": (16, 16), "MLA": (24, 16), "no multiple": (12, 10), "wide values": (8, 20)}
KINDS = {"plain": Scores(0.3), "softcap": Scores(0.3, 1.5), "sinks": Scores(0.3), "both": Scores(0.3, 1.5)}


def strict_forward(inputs):
    """The stand-in, as exacting as flash attention of what it reads."""
    assert all(x.shape[-1] == inputs.query_QHE.shape[-1] and x.stride(-1) == 1 for x in inputs[:3])
    assert all(step % 8 == 0 for x in inputs[:3] for step in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
    assert inputs.longest == inputs.cu_queries.diff().max()
    return plain_forward(inputs)


STAND_IN = replace(PLAIN, forward=strict_forward)
PATHS = {"one call": PackedAttention(STAND_IN, ""), "blocks": PackedAttention(None, "")}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(packed_attention, "ROWS_PER_BLOCK", 7)


def case_of(kind="plain", heads="GQA", widths="equal", window=None, device="cpu", dtype=torch.float32):
    """Query [H, T, E], key [G, T, E], value [G, T, F], segments and scores, drawn in a precision that `dtype` holds."""
    torch.manual_seed(0)
    (num_heads, num_groups), (width, value_width), total = HEADS[heads], WIDTHS[widths], sum(LENGTHS)
    shapes = (num_heads, total, width), (num_groups, total, width), (num_groups, total, value_width)
    tensors = [(2 * torch.randn(shape)).to(device, dtype) for shape in shapes]
    scores = replace(KINDS[kind], sinks_H=torch.randn(num_heads).to(device, dtype) if kind in ("sinks", "both") else None)
    return *tensors, Segments(LENGTHS, torch.device(device), window), scores


def written_out(query_HTE, key_GTE, value_GTF, segments, scores, dtype=torch.float64):
    query_HTE, key_GTE, value_GTF = (x.to(dtype) for x in (query_HTE, key_GTE, value_GTF))
    group_H = torch.arange(len(query_HTE)) // (len(query_HTE) // len(key_GTE))
    outputs = []
    position_L = torch.arange(max(segments.lengths), device=query_HTE.device)
    parts = zip(*(x.split(segments.lengths, dim=1) for x in (query_HTE, key_GTE[group_H], value_GTF[group_H])), strict=True)
    for query_HLE, key_HLE, value_HLF in parts:
        distance_LL = position_L[: query_HLE.shape[1], None] - position_L[: query_HLE.shape[1]]
        allowed_LL = (distance_LL >= 0) & (distance_LL < (segments.window or len(position_L)))
        scores_HLL = query_HLE @ key_HLE.mT * scores.scale
        if scores.softcap is not None:
            scores_HLL = scores.softcap * (scores_HLL / scores.softcap).tanh()
        weights_HLL = scores_HLL.exp() * allowed_LL
        total_HL1 = weights_HLL.sum(-1, keepdim=True)
        if scores.sinks_H is not None:
            total_HL1 = total_HL1 + scores.sinks_H.to(dtype).exp()[:, None, None]
        outputs.append(weights_HLL / total_HL1 @ value_HLF)
    return torch.cat(outputs, dim=1).transpose(0, 1)


def assert_equals_written_out(attention, case, tolerance=1e-5):
    ours = attention(*case)
    expected = written_out(*case)
    assert ours.shape == expected.shape and ours.dtype == case[0].dtype
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


@pairwise(path=PATHS, kind=KINDS, window=WINDOWS)
def test_windows_caps_and_sinks(path, kind, window):
    assert_equals_written_out(PATHS[path], case_of(kind, window=WINDOWS[window]))


@pairwise(path=PATHS, kind=["plain", "both"], heads=HEADS, widths=WIDTHS)
def test_any_heads_and_widths(path, kind, heads, widths):
    assert_equals_written_out(PATHS[path], case_of(kind, heads, widths, window=9))


@pytest.mark.parametrize("path", PATHS)
def test_strided_inputs_as_models_hand_them_over(path):
    query_HTE, key_GTE, value_GTF, segments, scores = case_of("sinks", window=4)
    fused_THE = torch.cat([x.transpose(0, 1) for x in (query_HTE, key_GTE, value_GTF)], dim=1)
    query_HTE, key_GTE, value_GTF = (x.transpose(0, 1) for x in fused_THE.split((4, 2, 2), dim=1))
    odd_GTF = torch.nn.functional.pad(value_GTF, (1, 2))[..., 1:-2]
    for value in (value_GTF, odd_GTF):
        assert_equals_written_out(PATHS[path], (query_HTE, key_GTE, value, segments, scores))


@pytest.mark.parametrize("taken", ["window", "softcap", "sinks_H", "lengths"])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_taken_away_is_missed(path, taken):
    *tensors, segments, scores = case = case_of("both", window=4)
    expected = written_out(*case)
    if taken in ("window", "lengths"):
        segments = replace(segments, **{taken: None if taken == "window" else (sum(LENGTHS),)})
    else:
        scores = replace(scores, **{taken: None})
    assert (PATHS[path](*tensors, segments, scores) - expected).abs().max() > 0.1


def test_one_token_documents_alone():
    *tensors, segments, scores = case_of("sinks")
    segments = replace(segments, lengths=(1,) * sum(LENGTHS))
    for attention in PATHS.values():
        assert_equals_written_out(attention, (*tensors, segments, scores))


@pytest.mark.parametrize("max_scores", [1, 50])
def test_few_scores_at_a_time(monkeypatch, max_scores):
    monkeypatch.setattr(packed_attention, "MAX_SCORES", max_scores)
    assert_equals_written_out(PATHS["blocks"], case_of("both", window=9))


def test_what_flash_attention_cannot_do_is_done_in_blocks():
    def called(inputs):
        raise AssertionError("flash attention was called")

    uncapped = PackedAttention(replace(PLAIN, forward=called, has_softcap=False), "")
    assert_equals_written_out(uncapped, case_of("softcap"))
    *tensors, segments, scores = case_of()
    wide = [torch.nn.functional.pad(x, (0, 264 - x.shape[-1])) for x in tensors]
    assert_equals_written_out(uncapped, (*wide, segments, scores))
    with pytest.raises(AssertionError, match="was called"):
        uncapped(*tensors, segments, scores)


@pytest.mark.parametrize("kind", ["plain", "sinks"])
def test_blocks_form_no_square(kind):
    length = 2048
    window = 64
    torch.manual_seed(0)
    query_HTE = torch.randn(1, length, 8)
    scores = replace(KINDS[kind], sinks_H=torch.randn(1) if kind == "sinks" else None)
    with LiveBytes() as live:
        in_blocks(query_HTE, query_HTE, query_HTE, Segments((length,), torch.device("cpu"), window), scores)
    assert live.peak < length * length / 4  # of bytes


@pytest.fixture
def real_attention(real_flash) -> PackedAttention:
    return PackedAttention(real_flash, "")


@pytest.mark.gpu
@pairwise(kind=KINDS, widths=WIDTHS, window=WINDOWS)
def test_on_a_gpu_it_errs_at_most_twice_as_much_as_plain_pytorch(real_attention, kind, widths, window):
    case = case_of(kind, widths=widths, window=WINDOWS[window], device=DEVICE, dtype=torch.bfloat16)
    exact = written_out(*case)
    ours = real_attention(*case)
    plain = written_out(*case, dtype=torch.bfloat16)
    assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.numel() ** 0.5


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device(real_attention):
    case = case_of("sinks", device=DEVICE, dtype=torch.bfloat16, window=4)
    real_attention(*case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        real_attention(*case[:3], Segments(LENGTHS, torch.device(DEVICE), 4), case[4])
    finally:
        torch.cuda.set_sync_debug_mode("default")
