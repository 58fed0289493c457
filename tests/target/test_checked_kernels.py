"""The kernels of a target are checked before it is loaded: those that it will run, and no others."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from engine import kernels as package
from engine.config.sections import TargetSection
from engine.kernels import TargetKernels
from engine.kernels.self_check import SelfCheck
from engine.target import checked_kernels

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
BF16 = TargetSection(dtype="bfloat16")
DEQUANTISED = TargetSection(dtype="bfloat16", keep_quantised="none")
FP8_ROWS = TargetSection(dtype="bfloat16", fp8_activations=True)


@pytest.fixture
def asked(monkeypatch) -> list[SimpleNamespace]:
    """What the self-check was asked for; it finds that fp8_linear fails."""
    calls = []

    def failed(self, kernels, dtype, *, target, head_dim):
        calls.append(SimpleNamespace(target=target, dtype=dtype, head_dim=head_dim))
        return {"fp8_linear"}

    def choose(device, dtype, **chosen):
        names = [name for name, is_chosen in chosen.items() if is_chosen]
        return TargetKernels(packed_attention=tuple(names))

    monkeypatch.setattr(SelfCheck, "failed", failed)
    monkeypatch.setattr(checked_kernels, "choose_target_kernels", choose)
    monkeypatch.setattr(package, "_failed", set())
    return calls


@pytest.mark.parametrize(
    ("quantised", "section", "expected"),
    [
        (None, BF16, ()),
        (FP8, BF16, ("fp8",)),
        (FP8, DEQUANTISED, ()),
        (FP8, FP8_ROWS, ("fp8", "fp8_activations")),
    ],
)
def test_what_a_target_will_run_is_checked(asked, quantised, section, expected):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    if quantised is not None:
        config.quantization_config = quantised
    self_check = SelfCheck(torch.device("cpu"), None, lambda flags: flags, print)
    checked_kernels.check_target_kernels(config, section, self_check)
    (call,) = asked
    assert call.target.packed_attention == expected
    assert (call.dtype, call.head_dim) == (torch.bfloat16, 16)
    assert package._failed == {"fp8_linear"}
