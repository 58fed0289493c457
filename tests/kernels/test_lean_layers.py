"""Layers that keep only their inputs have the gradients of plain PyTorch, and keep no more than that."""

import torch
from torch.nn.functional import rms_norm, silu

from engine.kernels.lean_layers import lean_rms_norm, swiglu_down

ROWS, SIZE, WIDTH = 7, 6, 10


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def kept_bytes(function, *inputs) -> int:
    """Return the bytes that the backward pass keeps, without those of the inputs."""
    own = {x.untyped_storage().data_ptr() for x in inputs}
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*inputs)
    return sum(kept.values())


def test_rms_norm_has_the_gradients_of_pytorch_for_rows_and_heads():
    torch.manual_seed(0)
    for shape in ((ROWS, SIZE), (ROWS, 3, SIZE)):
        x, weight_D = draw(*shape), draw(SIZE)
        torch.testing.assert_close(lean_rms_norm(x, weight_D, 1e-5), rms_norm(x, (SIZE,), weight_D, 1e-5))
        assert torch.autograd.gradcheck(lambda *inputs: lean_rms_norm(*inputs, 1e-5), (x, weight_D))
    scales_bytes = ROWS * 3 * x.itemsize
    assert kept_bytes(lambda *inputs: lean_rms_norm(*inputs, 1e-5), x, weight_D) == scales_bytes


def test_swiglu_down_has_the_gradients_of_pytorch_and_keeps_its_inputs_only():
    torch.manual_seed(0)
    inputs = draw(ROWS, WIDTH), draw(ROWS, WIDTH), draw(SIZE, WIDTH)
    gate_QF, up_QF, weight_DF = inputs
    torch.testing.assert_close(swiglu_down(*inputs), (silu(gate_QF) * up_QF) @ weight_DF.T)
    assert torch.autograd.gradcheck(swiglu_down, inputs)
    assert kept_bytes(swiglu_down, *inputs) == 0


def test_half_precision_norms_are_computed_in_fp32():
    torch.manual_seed(0)
    x, weight_D = torch.randn(ROWS, SIZE).bfloat16(), torch.randn(SIZE).bfloat16()
    expected = rms_norm(x.float(), (SIZE,), weight_D.float(), 1e-5)
    torch.testing.assert_close(lean_rms_norm(x, weight_D, 1e-5), expected.bfloat16())
