"""What tests of several kernels ask of a GPU."""

import pytest
import torch

from engine.kernels import flash


@pytest.fixture(params=[flash.flash_attn, flash.torch_flash], ids=["flash-attn", "torch"])
def real_flash(request, monkeypatch) -> flash.FlashAttention:
    """Each implementation of flash attention that is installed, as if it were the only one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = request.param()
    if found is None:
        pytest.skip(f"{request.param.__name__}() finds none installed")
    monkeypatch.setattr(flash, "available_flash", lambda: found)
    reason = flash.refusal(torch.bfloat16, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    return found
