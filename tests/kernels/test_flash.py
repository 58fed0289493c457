"""flash-attn and PyTorch are called as they ask to be; what they compute is tested where it is used."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from engine.kernels import flash
from engine.kernels.flash import FlashInputs
from tests.kernels.plain_flash import PLAIN, plain_backward, plain_forward

STARTS = torch.tensor([0, 5, 6, 19], dtype=torch.int32)
OPTIONS = {"scaling": 0.3, "window": 4, "softcap": 2.0, "longest": 13}


def inputs_of(device="cpu", **options) -> FlashInputs:
    torch.manual_seed(0)
    query_QHE, key_TGE, value_TGE = (torch.randn(19, heads, 16, device=device) for heads in (4, 2, 2))
    return FlashInputs(query_QHE, key_TGE, value_TGE, STARTS.to(device), STARTS.to(device), **options)


def test_refusals_say_why(monkeypatch):
    def refusal(dtype=torch.bfloat16, device="cuda"):
        return flash.refusal(dtype, torch.device(device))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "available_flash", lambda: PLAIN)
    assert refusal() is None and refusal(torch.float16) is None
    assert "not cpu" in refusal(device="cpu")
    assert "not in torch.float32" in refusal(torch.float32)
    monkeypatch.setattr(flash, "available_flash", lambda: None)
    assert "neither" in refusal()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in refusal()


def varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left=-1,
    window_size_right=-1, softcap=0.0,
):  # fmt: skip
    """flash-attn's function as of 2.7.0 and 2.8.3, as far as arguments without defaults go, and those we give."""
    assert dropout_p == 0 and causal and window_size_right == (-1 if window_size_left < 0 else 0)
    window = None if window_size_left < 0 else window_size_left + 1
    options = softmax_scale, window, softcap or None, max(max_seqlen_q, max_seqlen_k)
    inputs = FlashInputs(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    assert inputs.segments[2:] == (max_seqlen_q, max_seqlen_k)
    return *plain_forward(inputs), torch.empty(0), torch.empty(2)


def varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    """Likewise."""
    inputs = FlashInputs(q, k, v, cu_seqlens_q, cu_seqlens_k)
    assert inputs.segments[2:] == (max_seqlen_q, max_seqlen_k) and not deterministic and rng_state is None
    assert (dropout_p, softmax_scale, causal, softcap, alibi_slopes) == (0, inputs.scale, True, 0, None)
    assert window_size_left == window_size_right == -1
    for grad, result in zip((dq, dk, dv), plain_backward(inputs, dout, out, softmax_lse), strict=True):
        grad.copy_(result)
    return torch.empty(0)


def test_the_package_gets_its_arguments_in_its_order(monkeypatch):
    package = ModuleType("flash_attn")
    functions = {"_flash_attn_varlen_forward": varlen_forward, "_flash_attn_varlen_backward": varlen_backward}
    package.__version__ = "2.8.3"
    package.flash_attn_interface = SimpleNamespace(**functions)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    found = flash.flash_attn.__wrapped__()
    for options in ({}, OPTIONS):
        inputs = inputs_of(**options)
        for ours, expected in zip(found.forward(inputs), plain_forward(inputs), strict=True):
            assert ours.isfinite().all() and torch.equal(ours, expected)
    inputs = inputs_of()
    results = torch.randn(19, 4, 16), *plain_forward(inputs)
    for ours, expected in zip(found.backward(inputs, *results), plain_backward(inputs, *results), strict=True):
        assert torch.equal(ours, expected)
    package.__version__ = "2.6.3"  # its log-sum-exp is padded
    assert flash.flash_attn.__wrapped__() is None


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "window"])
def test_pytorchs_operators_take_these_arguments_and_return_these_shapes(options):
    inputs = inputs_of("meta", **options)
    output_QHE, lse_HQ = flash._torch_forward(inputs)
    assert output_QHE.shape == inputs.query_QHE.shape and lse_HQ.shape == (4, 19) and lse_HQ.dtype == torch.float32
    grads = flash._torch_backward(inputs, output_QHE, output_QHE, lse_HQ)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs[:3]]
