"""Products are those of float64, in every layout, and their gradients too."""

import pytest
import torch

from engine.kernels import matmul
from engine.kernels.matmul import Linear, add_product, batched_product, linear, product
from tests.pairwise import pairwise

CHOICE = matmul._onednn_is_faster
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1, 1), (33, 7, 65), (128, 512, 31), (0, 5, 3), (5, 0, 3)]


@pytest.fixture(params=["onednn", "mkl"], autouse=True)
def library(request, monkeypatch) -> None:
    """The library of fp32 products, which otherwise depends on the processor."""
    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: request.param == "onednn")


@pytest.mark.parametrize(
    ("vendor", "flags", "is_faster"),
    [("GenuineIntel", "avx2 avx512f", False), ("AuthenticAMD", "avx2 avx512f", True), ("AuthenticAMD", "avx avx2", False)],
)
def test_onednn_is_for_processors_on_which_only_it_runs_avx512(vendor, flags, is_faster, monkeypatch):
    monkeypatch.setattr(matmul, "_processor", lambda: f"vendor_id : {vendor}\nflags : fpu {flags} sse")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert CHOICE.__wrapped__() is is_faster
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert CHOICE.__wrapped__() is True


def draw(*shape: int, transposed: bool = False) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape[::-1], generator=g).mT if transposed else torch.randn(*shape, generator=g)


@pairwise(shape=SHAPES, layouts=LAYOUTS, dtype=DTYPES)
def test_a_product_is_that_of_float64_within_one_rounding(shape, layouts, dtype):
    rows, inner, columns = shape
    a_MK = draw(rows, inner, transposed=layouts[0]).to(dtype)
    b_KN = draw(inner, columns, transposed=layouts[1]).to(dtype)
    ours = product(a_MK, b_KN)
    expected = a_MK.double() @ b_KN.double()
    assert ours.dtype == dtype and ours.shape == expected.shape
    scale = (a_MK.double().norm(dim=1, keepdim=True) * b_KN.double().norm(dim=0)).clamp_min(1e-30)
    bound = torch.finfo(dtype).eps * (2 if dtype in (torch.bfloat16, torch.float16) else 16)  # fp32 adds up K terms
    assert ((ours.double() - expected).abs() <= bound * scale).all()


@pairwise(shape=SHAPES, layouts=LAYOUTS, dtype=DTYPES, wide=[False, True])
def test_a_product_is_added_to_a_sum_in_its_precision(shape, layouts, dtype, wide):
    rows, inner, columns = shape
    a_MK = draw(rows, inner, transposed=layouts[0]).to(dtype)
    b_KN = draw(inner, columns, transposed=layouts[1]).to(dtype)
    sum_MN = draw(rows, columns + 1)[:, :columns].to(torch.float32 if wide else dtype)
    expected = sum_MN + product(a_MK, b_KN)
    add_product(sum_MN, a_MK, b_KN)
    eps = torch.finfo(dtype).eps
    scale = (a_MK.double().norm(dim=1, keepdim=True) * b_KN.double().norm(dim=0)).clamp_min(1.0)
    difference = (sum_MN.double() - expected.double()).abs()
    assert (difference <= 16 * eps * scale).all()  # the order of the K terms is the library's choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batched_product_is_one_product_each(dtype):
    a_GMK = draw(3, 17, 8).to(dtype)
    b_GKN = draw(3, 8, 5).to(dtype)
    together = batched_product(a_GMK, b_GKN)
    assert together.shape == (3, 17, 5)
    for whole, a_MK, b_KN in zip(together, a_GMK, b_GKN, strict=True):
        torch.testing.assert_close(whole, product(a_MK, b_KN))


@pytest.mark.parametrize("num_rows", [0, 1, 50])
@pytest.mark.parametrize("wanted", ["both", "input", "weight"])
def test_gradients_of_linear_are_pytorch_s(wanted, num_rows):
    grads = []
    for implementation in (linear, torch.nn.functional.linear):
        x_QK = draw(num_rows, 12).requires_grad_(wanted != "weight")
        weight_NK = draw(9, 12).requires_grad_(wanted != "input")
        (implementation(x_QK, weight_NK).sin().sum()).backward()
        grads.append([x_QK.grad, weight_NK.grad])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_a_linear_module_is_pytorch_s_with_its_name_and_shape():
    torch.manual_seed(0)
    ours = Linear(6, 4)
    theirs = torch.nn.Linear(6, 4, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x_QK = draw(3, 6)
    torch.testing.assert_close(ours(x_QK), theirs(x_QK))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_in_fp32_where_the_processor_lacks_it(dtype, monkeypatch):
    monkeypatch.setattr(matmul, "_has_fast_products", lambda dtype: dtype == torch.float32)
    x_QK = draw(33, 65).to(dtype).requires_grad_()
    weight_NK = draw(12, 65).to(dtype).requires_grad_()
    output_QN = linear(x_QK, weight_NK)
    assert torch.equal(output_QN, product(x_QK.float(), weight_NK.float().mT).to(dtype))
    output_QN.backward(torch.ones_like(output_QN))
    ones_QN = torch.ones(33, 12)
    assert torch.equal(x_QK.grad, product(ones_QN, weight_NK.float()).to(dtype))
    assert torch.equal(weight_NK.grad, product(ones_QN.mT, x_QK.float()).to(dtype))
