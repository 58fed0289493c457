"""One pass over a target's logits finds the largest, its first token and the log-sum-exp."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.interface import LogitTransform

kernel = pytest.importorskip("engine.kernels.head_stats", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the interpreter runs it

# Vocabulary and block: one token, less than one block, whole blocks, a prime just above one.
BLOCKS = {
    "one token": (1, 32),
    "narrow": (37, 64),
    "even": (64, 32),
    "prime": (97, 32),
    "wide": (4099, None),
}
NONE = LogitTransform()
TRANSFORMS = {
    "none": NONE,
    "scaled": LogitTransform(scale=0.25),
    "capped": LogitTransform(soft_cap=3.0),
    "all": LogitTransform(scale=3.0, soft_cap=5.0, temperature=0.7),
}


@pytest.fixture(params=BLOCKS)
def vocab_size(request, monkeypatch) -> int:
    size, block = BLOCKS[request.param]
    if block is not None:
        monkeypatch.setattr(kernel, "MAX_BLOCK_V", block)
    return size


def draw(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (3 * torch.randn(num_rows, vocab_size, generator=generator)).to(DEVICE, dtype)


def assert_is_the_reference(logits_NV, transform=NONE) -> None:
    best_N, argmax_N, lse_N = kernel.head_stats(logits_NV, transform)
    expected_best_N, expected_argmax_N, expected_lse_N = reference.head_stats(logits_NV, transform)
    assert (best_N.dtype, argmax_N.dtype, lse_N.dtype) == (torch.float32, torch.int64, torch.float32)
    torch.testing.assert_close(best_N, expected_best_N, rtol=1e-5, atol=1e-6)
    assert torch.equal(argmax_N, expected_argmax_N)
    torch.testing.assert_close(lse_N, expected_lse_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_statistics_are_those_of_the_reference(vocab_size, dtype, transform):
    assert_is_the_reference(draw(3, vocab_size, dtype), TRANSFORMS[transform])


def test_of_tokens_that_tie_the_first_is_the_most_likely(vocab_size):
    logits_NV = draw(4, vocab_size)
    logits_NV[0] = 2.0
    logits_NV[1, vocab_size // 2 :] = 20.0
    logits_NV[2, [vocab_size // 3, vocab_size - 1]] = 20.0
    logits_NV[3, [0, vocab_size - 1]] = 20.0
    assert_is_the_reference(logits_NV)
    argmax_N = kernel.head_stats(logits_NV, NONE)[1]
    assert argmax_N.tolist() == [0, vocab_size // 2, vocab_size // 3, 0]


def test_saturated_logits_tie_as_they_do_in_plain_pytorch(vocab_size):
    assert_is_the_reference(1e4 * draw(3, vocab_size).abs() + 1e4, LogitTransform(soft_cap=2.0))


def test_tanh_is_that_of_pytorch():
    x_V = torch.cat([torch.linspace(-12, 12, 31), torch.logspace(-6, 0, 20)]).to(DEVICE)
    best_N, _, _ = kernel.head_stats(x_V[:, None], LogitTransform(soft_cap=1.0))
    torch.testing.assert_close(best_N, x_V.tanh(), rtol=2**-20, atol=0)


def test_large_and_excluded_logits_stay_finite(vocab_size):
    logits_NV = 1e4 * draw(3, vocab_size)
    logits_NV[1, : vocab_size - 1] = -torch.inf
    logits_NV[2] = -1e30
    assert_is_the_reference(logits_NV)
    assert kernel.head_stats(logits_NV, NONE)[2].isfinite().all()


def test_a_row_that_is_no_number_says_so_and_names_a_token_that_exists(vocab_size):
    logits_NV = draw(3, vocab_size)
    logits_NV[0, vocab_size // 2], logits_NV[1] = torch.nan, torch.nan
    best_N, argmax_N, lse_N = kernel.head_stats(logits_NV, NONE)
    assert best_N[:2].isnan().all() and lse_N[:2].isnan().all()
    assert (argmax_N >= 0).all() and (argmax_N < vocab_size).all()
    assert lse_N[2].isfinite()


def test_rows_may_lie_apart_and_be_views():
    logits_NV = draw(3, 40)
    for view in (logits_NV[:, 3:-4], logits_NV[::2], logits_NV.mT.contiguous().mT):
        assert_is_the_reference(view)
    empty = kernel.head_stats(logits_NV[:0], NONE)
    assert [tuple(x.shape) for x in empty] == [(0,)] * 3


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the kernel is interpreted above")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_for_a_gpu_it_is_the_reference(dtype, transform):
    for size in (1, 500, 32000, 65536, 65537):
        assert_is_the_reference(draw(130, size, dtype), TRANSFORMS[transform])
