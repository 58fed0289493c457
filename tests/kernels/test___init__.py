"""Which implementation runs where, and what a wish that cannot be met says."""

import pytest
import torch

from engine.kernels import PLAIN, Kernels, choose_kernels, reference
from engine.kernels.elementwise import liger_elementwise, rotate_both

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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
def test_a_gpu_runs_triton_where_it_is_installed(wanted):
    attention = pytest.importorskip("engine.kernels.ancestor_attention", reason="Triton is not installed")
    row_loss = pytest.importorskip("engine.kernels.row_loss")
    chosen = choose_kernels(wanted, GPU, torch.bfloat16, 128, Kernels(recompute="mlp"))
    assert chosen.attention is attention.ancestor_attention and chosen.walk.row_loss is row_loss.row_loss
    assert chosen.recompute == "mlp" and "Triton" in chosen.reason


def test_without_triton_a_gpu_falls_back_or_refuses(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_kernels("auto", GPU, torch.bfloat16, 128).attention is reference.ancestor_attention
    with pytest.raises(ValueError, match="pip install triton"):
        choose_kernels("triton", GPU, torch.bfloat16, 128)


def test_liger_s_rotary_embedding_is_ours():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    g = torch.Generator().manual_seed(0)
    query_QHE, key_QGE = torch.randn(9, 4, 16, generator=g), torch.randn(9, 2, 16, generator=g)
    angle_Q1E = torch.randn(9, 1, 8, generator=g).repeat(1, 1, 2)
    cos_sin = angle_Q1E.cos(), angle_Q1E.sin()
    expected = rotate_both(query_QHE, key_QGE, cos_sin)
    ours = liger_elementwise().rotate_both(query_QHE.clone(), key_QGE.clone(), cos_sin)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
