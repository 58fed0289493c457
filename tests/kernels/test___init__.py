"""Which implementation runs where, and what a wish that cannot be met says."""

import pytest
import torch

from engine.kernels import (
    PLAIN,
    Kernels,
    choose_fp8_activations,
    choose_fp8_linear,
    choose_kernels,
    choose_packed_attention,
    flash,
    reference,
)

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def test_a_cpu_runs_plain_pytorch_and_says_why():
    chosen = choose_kernels("auto", CPU, torch.float32, 64)
    assert (chosen.attention, chosen.vocab_loss) == (PLAIN.attention, PLAIN.vocab_loss)
    assert "CPU" in chosen.reason


@pytest.mark.parametrize("device", [CPU, GPU])
def test_the_specification_runs_anywhere(device):
    chosen = choose_kernels("reference", device, torch.bfloat16, 64)
    assert (chosen.attention, chosen.vocab_loss) == (reference.ancestor_attention, reference.vocab_loss)


@pytest.mark.parametrize("wanted", ["triton", "flash"])
def test_a_kernel_that_needs_a_gpu_is_refused_on_a_cpu(wanted):
    with pytest.raises(ValueError, match=f"kernels={wanted} needs a GPU.*kernels=auto"):
        choose_kernels(wanted, CPU, torch.float32, 64)


@pytest.mark.parametrize("wanted", ["auto", "triton"])
def test_a_gpu_runs_triton_where_it_is_installed(wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attention = pytest.importorskip("engine.kernels.ancestor_attention", reason="Triton is not installed")
    row_loss = pytest.importorskip("engine.kernels.row_loss")
    chosen = choose_kernels(wanted, GPU, torch.bfloat16, 128, Kernels(recompute="mlp"))
    assert chosen.attention is attention.ancestor_attention and chosen.loss_pass.row_loss is row_loss.row_loss
    anchored = pytest.importorskip("engine.kernels.anchored_attention")
    token_row_loss = pytest.importorskip("engine.kernels.token_row_loss")
    assert chosen.anchored_attention is anchored.anchored_attention
    assert chosen.token_pass.row_loss is token_row_loss.token_row_loss
    assert chosen.recompute == "mlp" and "Triton" in chosen.reason


def test_without_triton_a_gpu_falls_back_or_refuses(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_kernels("auto", GPU, torch.bfloat16, 128).attention is reference.ancestor_attention
    with pytest.raises(ValueError, match="pip install triton"):
        choose_kernels("triton", GPU, torch.bfloat16, 128)


def test_what_triton_cannot_hold_is_refused_or_left_to_plain_pytorch():
    pytest.importorskip("triton", reason="Triton is not installed")
    for device_capability, head_dim, problem in (((7, 5), 128, "8.0"), ((9, 0), 512, "up to 256")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda device, found=device_capability: found)
            with pytest.raises(ValueError, match=f"kernels=triton cannot run.*{problem}.*kernels=auto"):
                choose_kernels("triton", GPU, torch.bfloat16, head_dim)
            chosen = choose_kernels("auto", GPU, torch.bfloat16, head_dim)
        assert chosen.attention is reference.ancestor_attention and problem in chosen.reason


@pytest.mark.parametrize("choose", [choose_fp8_linear, choose_fp8_activations])
def test_weights_in_fp8_stay_so_on_a_gpu_that_triton_runs_on(choose, monkeypatch):
    name = choose.__name__.removeprefix("choose_")
    fused = getattr(pytest.importorskip(f"engine.kernels.{name}", reason="Triton is not installed"), name)
    for device_capability, expected in (((8, 0), fused), ((9, 0), fused), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=device_capability: found)
        assert choose(GPU) is expected
    assert choose(CPU) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose(GPU) is None


def test_a_target_attends_in_one_call_where_flash_attention_runs(monkeypatch):
    on_cpu = choose_packed_attention(CPU, torch.float32)
    assert on_cpu.flash is None and on_cpu.reason.startswith("in blocks") and "not cpu" in on_cpu.reason
    monkeypatch.setattr(flash, "available_flash", lambda: flash.FlashAttention("some flash", None, None, False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_gpu = choose_packed_attention(GPU, torch.bfloat16)
    assert on_gpu.flash.name == "some flash" and on_gpu.reason == "some flash, all documents in one call"
    assert choose_packed_attention(GPU, torch.float32).flash is None
