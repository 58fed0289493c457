"""The target's head: what it says without [N, V] is what [N, V] says."""

import pytest
import torch

from engine.target import head as head_module
from engine.target.head import TargetHead

SHAPES = [(1, 1), (7, 97), (33, 257), (0, 50)]
FINALS = [dict(), dict(scale=0.25), dict(soft_cap=5.0), dict(scale=3.0, soft_cap=2.0, temperature=0.7), dict(bias=True)]


def _head(vocab: int, bias: bool = False, **final) -> TargetHead:
    torch.manual_seed(vocab)
    return TargetHead(torch.randn(vocab, 16), bias_V=torch.randn(vocab) if bias else None, **final)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(head_module, "_SLOTS_PER_CHUNK", 8)
    monkeypatch.setitem(head_module._VOCAB_PER_BLOCK, "cpu", 32)


@pytest.mark.parametrize("final", FINALS)
@pytest.mark.parametrize("slots, vocab", SHAPES)
def test_streamed_argmax_and_log_sum_exp_equal_those_of_full_logits(slots, vocab, final, small_blocks):
    head = _head(vocab, **final)
    hidden_ND = torch.randn(slots, 16) * 3
    logits_NV = head.logits(hidden_ND)
    argmax_N, lse_N = head.argmax_and_lse(hidden_ND)
    assert argmax_N.dtype == torch.int32 and lse_N.dtype == torch.float32
    assert torch.equal(argmax_N, logits_NV.argmax(-1).to(torch.int32))
    torch.testing.assert_close(lse_N, logits_NV.logsumexp(-1))


def test_no_tensor_over_slots_and_vocabulary_exists(small_blocks, monkeypatch):
    seen = []
    logits = TargetHead.logits
    monkeypatch.setattr(TargetHead, "logits", lambda self, hidden: seen.append(logits(self, hidden)) or seen[-1])
    _head(257).argmax_and_lse(torch.randn(33, 16))
    assert len(seen) == 5 * 9
    assert max(block.numel() for block in seen) == 8 * 32


def test_final_steps_come_in_the_order_scale_cap_temperature():
    head = TargetHead(torch.tensor([[2.0]]), scale=3.0, soft_cap=4.0, temperature=0.5, bias_V=torch.tensor([1.0]))
    expected = 4.0 * torch.tanh(torch.tensor(3.0 * (2.0 * 1.5 + 1.0)) / 4.0) / 0.5
    torch.testing.assert_close(head.logits(torch.tensor([[1.5]])), expected.view(1, 1))


@pytest.mark.parametrize("final", FINALS)
def test_rows_are_the_same_columns_of_the_logits(final):
    head = _head(97, **final)
    hidden_ND = torch.randn(5, 16)
    ids_U = torch.tensor([3, 90, 11])
    torch.testing.assert_close(head.rows(ids_U).logits(hidden_ND), head.logits(hidden_ND)[:, ids_U])


def test_saturated_logits_stay_finite(small_blocks):
    head = TargetHead(torch.eye(64)[:, :16] * 1e4)
    argmax_N, lse_N = head.argmax_and_lse(torch.eye(16) * 1e4)
    assert torch.equal(argmax_N, torch.arange(16, dtype=torch.int32))
    torch.testing.assert_close(lse_N, torch.full((16,), 1e8))


def test_half_precision_heads_give_fp32_logits():
    head = TargetHead(torch.randn(50, 16, dtype=torch.bfloat16))
    assert head.logits(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.float32
    assert head.logits(torch.randn(3, 16)).shape == (3, 50)


@pytest.mark.parametrize("final", FINALS)
@pytest.mark.parametrize("slots, vocab", [(0, 50), (9, 97)])
def test_the_fused_pass_gives_what_plain_pytorch_gives(slots, vocab, final, small_blocks, monkeypatch):
    fused = pytest.importorskip("engine.kernels.head_stats", reason="Triton is not installed")
    head = _head(vocab, **final)
    hidden_ND = torch.randn(slots, 16)
    expected_argmax_N, expected_lse_N = head.argmax_and_lse(hidden_ND)
    launches = []

    def counted(*arguments):
        launches.append(1)
        return fused.head_stats(*arguments)

    monkeypatch.setattr(head_module, "choose_head_stats", lambda device: counted)
    argmax_N, lse_N = head.argmax_and_lse(hidden_ND)
    assert torch.equal(argmax_N, expected_argmax_N)
    torch.testing.assert_close(lse_N, expected_lse_N)
    assert len(launches) == -(-slots // 8) * -(-vocab // 32)
