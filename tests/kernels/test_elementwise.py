"""Norm, SwiGLU and rotary embedding written out in float64, and liger-kernel's beside PyTorch's, gradients included."""

import types

import pytest
import torch

from engine.kernels.elementwise import Elementwise, liger_elementwise
from tests.kernels.fake_liger import install_liger

EPS = 1e-5
ROWS = (0, 1, 9, 130)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: Triton cannot interpret this kernel")


def norm_exactly(x, weight_D):
    return x * weight_D / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def swiglu_exactly(gate, up):
    return gate / (1 + (-gate).exp()) * up


def rotate_exactly(x_QHE, angle_QE):
    """The pairs (e, e + E/2) as complex numbers."""
    half = x_QHE.shape[-1] // 2
    turned = torch.complex(*x_QHE.chunk(2, -1)) * torch.polar(torch.ones_like(angle_QE), angle_QE)[:, None, :half]
    return torch.cat((turned.real, turned.imag), -1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(function, leaves, dtype=torch.float64, device="cpu") -> list[torch.Tensor]:
    """Outputs and the gradients of the leaves, in float64 on the CPU."""
    moved = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
    outputs = function(*moved)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    directions = [draw(*output.shape, seed=7).to(device, dtype) for output in outputs]
    values = [output.detach().double().cpu() for output in outputs]
    grads = torch.autograd.grad(outputs, moved, directions)
    return values + [grad.double().cpu() for grad in grads]


def operations(ours: Elementwise, num_rows: int, device: str = "cpu") -> dict[str, tuple]:
    """What is computed, exactly and by `ours`, and from what; the leaves are what this precision can hold."""
    angle_QE = draw(num_rows, 8, seed=1).repeat(1, 2)
    cos_sin = tuple(table[:, None].float().to(device) for table in (angle_QE.cos(), angle_QE.sin()))
    return {
        "norm": (norm_exactly, lambda x, w: ours.rms_norm(x, w, EPS), (draw(num_rows, 48), 1 + draw(48, seed=2) / 4)),
        "swiglu": (swiglu_exactly, ours.swiglu, (3 * draw(num_rows, 40), draw(num_rows, 40, seed=3))),
        "rotate": (
            lambda q, k: (rotate_exactly(q, angle_QE), rotate_exactly(k, angle_QE)),
            lambda q, k: ours.rotate_both(q, k, cos_sin),
            (draw(num_rows, 4, 16), draw(num_rows, 2, 16, seed=4)),
        ),
    }


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("name", ["norm", "swiglu", "rotate"])
def test_plain_pytorch_is_the_formula(name, num_rows):
    exactly, plainly, leaves = operations(Elementwise(), num_rows)[name]
    for ours, theirs in zip(with_gradients(plainly, leaves, torch.float32), with_gradients(exactly, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_liger_s_rotary_embedding_is_ours():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter can run this one
    exactly, by_liger, leaves = operations(liger_elementwise(), 9, device)["rotate"]
    by_liger = with_gradients(by_liger, leaves, torch.float32, device)
    for ours, theirs in zip(by_liger, with_gradients(exactly, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_of_ligers_rotary_embedding_only_query_and_key_are_taken(monkeypatch):
    """Its versions return two tensors or more."""
    rope = types.SimpleNamespace(apply=lambda query, key, cos, sin: (query + 1, key + 2, cos, sin))
    install_liger(monkeypatch, rope=rope)
    query_QHE = draw(3, 4, 8)
    key_QGE = draw(3, 2, 8, seed=1)
    tables = (draw(3, 1, 8), draw(3, 1, 8))
    query, key = liger_elementwise().rotate_both(query_QHE, key_QGE, tables)
    assert torch.equal(query, query_QHE + 1) and torch.equal(key, key_QGE + 2)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("name", ["norm", "swiglu", "rotate"])
def test_liger_errs_at_most_twice_as_much_as_plain_pytorch(name, num_rows, dtype):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    exactly, by_liger, leaves = operations(liger_elementwise(), num_rows, "cuda")[name]
    plainly = operations(Elementwise(), num_rows, "cuda")[name][1]
    leaves = [leaf.to(dtype).double() for leaf in leaves]
    exact = with_gradients(exactly, leaves)
    plain, ours = (with_gradients(function, leaves, dtype, "cuda") for function in (plainly, by_liger))
    for mine, plain_one, truth in zip(ours, plain, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (plain_one - truth).norm() + 1e-6 * truth.numel() ** 0.5
