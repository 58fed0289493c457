"""The fused loss of a chunk is that of plain PyTorch, gradients included, whatever the parts, the dtype and the block."""

from dataclasses import replace

import pytest
import torch

from engine.kernels import reference
from engine.kernels.interface import TokenChunk, TokenTargets
from engine.kernels.token_loss import TokenPass, token_loss
from engine.kernels.token_loss import token_row_loss as plain_row_loss
from tests.kernels.token_cases import PARTS, TRANSFORMS, make_case, results
from tests.pairwise import pairwise

kernel = pytest.importorskip("engine.kernels.token_row_loss", reason="the kernel is written in Triton, which is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the interpreter runs it, see conftest.py

NUM_SLOTS = 4
# Vocabulary and block: less than one block, two whole ones, a prime over four, and a prime just above the block that is used.
BLOCKS = {"narrow": (37, 64), "even": (64, 32), "prime": (97, 32), "wide": (4099, None)}
BIAS = {"no bias": False, "a bias": True}


def make_chunk(
    part: str = "all",
    transform: str = "capped",
    has_bias: bool = True,
    vocab: int = 37,
    dtype: torch.dtype = torch.float32,
    num_rows: int = 5,
    scale: float = 2.0,
) -> TokenChunk:
    """Return rows near enough to their targets that some are correct."""
    g = torch.Generator().manual_seed(0)
    terms, has_targets = PARTS[part]
    target_nV = (torch.randn(NUM_SLOTS, vocab, generator=g) * scale).to(dtype)
    slot_r = torch.randint(NUM_SLOTS, (num_rows,), generator=g)
    logits_rV = target_nV[slot_r].float() + torch.randn(num_rows, vocab, generator=g) * scale / 4
    bias_rV = torch.randn(num_rows, vocab, generator=g) * scale / 4
    label_r = torch.randint(vocab, (num_rows,), generator=g)
    label_r[:2] = target_nV.argmax(1)[slot_r[:2]]
    targets = TokenTargets(target_nV.to(DEVICE), slot_r.to(DEVICE), target_nV.argmax(1).to(DEVICE))
    return TokenChunk(
        logits_rV.to(DEVICE, dtype),
        bias_rV.to(DEVICE, dtype) if has_bias else None,
        TRANSFORMS[transform],
        label_r.to(DEVICE),
        targets if has_targets else None,
        terms,
    )


def copied(chunk: TokenChunk, dtype: torch.dtype) -> TokenChunk:
    """Return a chunk that may be overwritten, in another precision."""
    targets = chunk.targets
    return replace(
        chunk,
        logits_rV=chunk.logits_rV.to(dtype, copy=True),
        bias_rV=None if chunk.bias_rV is None else chunk.bias_rV.to(dtype, copy=True),
        targets=None if targets is None else replace(targets, logits_nV=targets.logits_nV.to(dtype)),
    )


def scored(row_loss, chunk: TokenChunk, dtype: torch.dtype | None = None, with_gradients: bool = True) -> list[torch.Tensor]:
    """Return statistics, gradients by the logits and, with a soft cap, gradients by the bias."""
    chunk = copied(chunk, dtype or chunk.logits_rV.dtype)
    found = [row_loss(chunk, with_gradients), chunk.logits_rV]
    if chunk.bias_rV is not None and chunk.transform.soft_cap is not None:
        found.append(chunk.bias_rV)
    return found


@pytest.fixture(params=BLOCKS)
def vocab(request, monkeypatch) -> int:
    size, block = BLOCKS[request.param]
    if block is not None:
        monkeypatch.setattr(kernel, "MAX_BLOCK_V", block)
    return size


@pairwise(indirect=["vocab"], part=PARTS, transform=TRANSFORMS, bias=BIAS, vocab=BLOCKS)
def test_statistics_and_gradients_are_those_of_plain_pytorch_in_float64(part, transform, bias, vocab):
    chunk = make_chunk(part, transform, BIAS[bias], vocab)
    for ours, true in zip(scored(kernel.token_row_loss, chunk), scored(plain_row_loss, chunk, torch.float64), strict=True):
        # exp(x) carries the rounding of x, some 20 here: 1e-6 of it, and of p and q before their difference
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-6)


@pairwise(indirect=["vocab"], part=["cross-entropy", "all"], dtype=[torch.float16, torch.bfloat16], vocab=["prime"])
def test_16_bit_logits_give_16_bit_gradients_of_the_error_of_plain_pytorch(part, dtype, vocab):
    chunk = make_chunk(part, vocab=vocab, dtype=dtype)
    ours = scored(kernel.token_row_loss, chunk)
    plain = scored(plain_row_loss, chunk)
    exact = scored(plain_row_loss, chunk, torch.float64)
    for own, plainly, true in zip(ours, plain, exact, strict=True):
        assert own.dtype == plainly.dtype
        # The interpreter cuts bf16 off where it stores it, instead of rounding it: twice the error again.
        times = 4 if dtype == torch.bfloat16 else 2
        assert (own - true).norm() <= times * (plainly - true).norm() + 1e-6 * true.norm()


def test_without_gradients_logits_stay(vocab):
    chunk = make_chunk(vocab=vocab)
    stats_4r, logits_rV, bias_rV = scored(kernel.token_row_loss, chunk, with_gradients=False)
    assert torch.equal(stats_4r, scored(kernel.token_row_loss, chunk)[0])
    assert torch.equal(logits_rV, chunk.logits_rV) and torch.equal(bias_rV, chunk.bias_rV)


def test_rows_are_read_and_written_only_as_far_as_the_vocabulary_goes():
    chunk = make_chunk(transform="raw", has_bias=False)
    padded_rW = torch.nn.functional.pad(chunk.logits_rV, (0, 3), value=7.0)
    stats_4r = kernel.token_row_loss(replace(chunk, logits_rV=padded_rW[:, :37]), True)
    expected_4r, gradient_rV = scored(kernel.token_row_loss, chunk)
    assert torch.equal(stats_4r, expected_4r) and torch.equal(padded_rW[:, :37], gradient_rV)
    assert (padded_rW[:, 37:] == 7).all()


def test_equal_distributions_have_no_distance_and_no_gradient():
    chunk = make_chunk("total variation", "raw", has_bias=False)
    same = replace(chunk, logits_rV=chunk.targets.logits_nV[chunk.targets.slot_r])
    stats_4r, gradient_rV = scored(kernel.token_row_loss, same)
    assert (stats_4r[1] == 1).all() and not stats_4r[2:].any() and not gradient_rV.any()


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_saturated_logits_are_those_of_plain_pytorch(scale):
    chunk = make_chunk(transform="raw", scale=scale)
    for ours, true in zip(scored(kernel.token_row_loss, chunk), scored(plain_row_loss, chunk, torch.float64), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4)


def test_a_row_that_is_not_a_number_says_so():
    chunk = make_chunk()
    chunk.logits_rV[1, 7] = torch.nan
    stats_4r, gradient_rV, _ = scored(kernel.token_row_loss, chunk)
    others_r = torch.arange(5, device=DEVICE) != 1
    assert stats_4r[[0, 2, 3], 1].isnan().all() and gradient_rV[1].isnan().all()
    assert stats_4r[:, others_r].isfinite().all() and gradient_rV[others_r].isfinite().all()


def test_no_rows_give_no_statistics():
    stats_4r, gradient_rV, _ = scored(kernel.token_row_loss, make_chunk(num_rows=0))
    assert stats_4r.shape == (4, 0) and gradient_rV.shape == (0, 37)


@pytest.mark.parametrize("part", ["cross-entropy", "all"])
def test_the_whole_loss_with_the_kernel_is_the_reference(part):
    case = make_case(part, "capped", "both are trained", "by likelihood").moved(torch.float32, DEVICE)
    ours = results(*case.loss(token_loss, TokenPass(kernel.token_row_loss, chunk_bytes=4000)))
    expected = results(*case.moved(torch.float64).loss(reference.token_loss))
    for own, true in zip(ours, expected, strict=True):
        torch.testing.assert_close(own.double(), true.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the kernel is interpreted above, not compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_for_a_gpu_it_errs_at_most_twice_as_much_as_plain_pytorch(dtype):
    for part in PARTS:
        for transform, has_bias in (("raw", False), ("capped", True)):
            chunk = make_chunk(part, transform, has_bias, 32003, dtype, 40)
            ours = scored(kernel.token_row_loss, chunk)
            plain = scored(plain_row_loss, chunk)
            exact = scored(plain_row_loss, chunk, torch.float64)
            for own, plainly, true in zip(ours, plain, exact, strict=True):
                # A GPU's own exp errs by 1e-6, and may so tip a token whose q and p are that near to the other side.
                assert (own - true).norm() <= 2 * (plainly - true).norm() + 1e-4 * true.norm()
