"""The loss in chunks is that of the reference, gradients included, whatever the parts, the bias and the chunk."""

from dataclasses import replace

import pytest
import torch

from engine.kernels import reference
from engine.kernels.interface import LogitTransform, TokenTerms
from engine.kernels.token_loss import PIECE_BYTES, TokenChunk, TokenPass, TokenTargets, token_loss, token_row_loss
from tests.kernels.token_cases import (
    BIASES,
    PARTS,
    TRANSFORMS,
    VOCAB,
    WEIGHTS,
    TokenCase,
    make_case,
    results,
)
from tests.live_bytes import LiveBytes
from tests.pairwise import pairwise

# Rows of a chunk, each of which has 4 bytes per token of logits, of the target's, and of a bias that is not added to them.
CHUNKS = {"one row": 1, "several": 12 * VOCAB * 4, "all rows": 1 << 20}
PIECES = {"one row": 1, "all rows": 1 << 20}
# Exponentials carry the rounding of logits of up to 20.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def assert_is_the_reference(case: TokenCase, dtype: torch.dtype, chunk_bytes: int = 1 << 20) -> None:
    ours = results(*case.moved(dtype).loss(token_loss, TokenPass(chunk_bytes=chunk_bytes)))
    expected = results(*case.moved(torch.float64).loss(reference.token_loss))
    for own, true in zip(ours, expected, strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), true.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pairwise(part=PARTS, transform=TRANSFORMS, bias=BIASES, weights=WEIGHTS, chunk=CHUNKS, piece=PIECES, dtype=TOLERANCE)
def test_chunks_are_the_reference(monkeypatch, part, transform, bias, weights, chunk, piece, dtype):
    monkeypatch.setitem(PIECE_BYTES, "cpu", PIECES[piece])
    assert_is_the_reference(make_case(part, transform, bias, weights), dtype, CHUNKS[chunk])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", ["none", "both are trained"])
def test_the_most_likely_tokens_of_each_row_are_those_without_the_bias(bias, transform):
    case = make_case("cross-entropy", transform, bias, "by likelihood")
    case = replace(case, rows=replace(case.rows, top_k=5))
    for chunk_bytes in CHUNKS.values():
        loss, _ = case.loss(token_loss, TokenPass(chunk_bytes=chunk_bytes))
        expected, _ = case.loss(reference.token_loss)
        assert torch.equal(loss.best_RK, expected.best_RK)
        logits_RV = case.leaves[0] @ case.weight_VD.T
        assert torch.equal(loss.best_RK[:, 0], logits_RV.argmax(1))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", ["none", "both are trained"])
def test_rows_without_labels_learn_the_target_s_most_likely_token(bias, chunk):
    case = make_case("all", "raw", bias, "by likelihood")
    likeliest_N = (case.target_ND @ case.weight_VD.T).argmax(1)
    found = replace(case, rows=replace(case.rows, label_R=None))
    told = replace(case, rows=replace(case.rows, label_R=likeliest_N[case.rows.slot_R]))
    assert_is_the_reference(found, torch.float32, CHUNKS[chunk])
    token_pass = TokenPass(chunk_bytes=CHUNKS[chunk])
    ours, expected = (results(*each.loss(token_loss, token_pass)) for each in (found, told))
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.mark.parametrize("bias", ["none", "both are trained"])
def test_no_rows_have_no_loss_and_no_gradients(bias):
    loss, grads = make_case(bias=bias, num_rows=0).loss(token_loss)
    assert loss.total == 0 and loss.kl_R.shape == (0,)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("part", ["cross-entropy", "all"])
def test_bf16_errs_at_most_twice_as_much_as_plain_pytorch(part):
    case = make_case(part, "capped", "both are trained", num_rows=64).moved(torch.bfloat16)
    # Whether the best of rounded logits is the target's token may differ, so that count is left out.
    ours = results(*case.loss(token_loss))
    plain = results(*case.loss(reference.token_loss))
    exact = results(*case.moved(torch.float64).loss(reference.token_loss))
    for index, (own, plainly, true) in enumerate(zip(ours, plain, exact, strict=True)):
        if index != 3:
            assert (own - true).norm() <= 2 * (plainly - true).norm() + 1e-6 * true.norm(), index


def test_a_hidden_size_of_another_precision_gets_its_gradient_in_it():
    case = make_case()
    half = replace(case, leaves=(case.leaves[0].to(torch.bfloat16),))
    _, (grad_RD,) = half.loss(token_loss)
    assert grad_RD.dtype == torch.bfloat16


def test_weights_that_are_fixed_save_a_pass(monkeypatch):
    calls = []

    def counted(chunk, with_gradients):
        calls.append(with_gradients)
        return TokenPass().row_loss(chunk, with_gradients)

    for weights, expected in (("fixed", [True]), ("by likelihood", [False, True])):
        calls.clear()
        make_case(bias="both are trained", weights=weights).loss(token_loss, TokenPass(counted))
        assert calls == expected


def test_without_gradients_statistics_are_those_with_them():
    found = []

    def both(*arguments):
        with torch.no_grad():
            found.append(token_loss(*arguments).cross_entropy_R)
        return token_loss(*arguments)

    loss, _ = make_case("all", "capped", "factor is trained").loss(both)
    assert torch.equal(found[0], loss.cross_entropy_R)


def test_slots_that_are_on_the_host_are_not_copied():
    case = make_case()
    known = replace(case, rows=replace(case.rows, host_slot_R=case.rows.slot_R.clone()))
    assert known.rows.slots_on_host is known.rows.host_slot_R
    assert torch.equal(known.loss(token_loss)[0].kl_R, case.loss(token_loss)[0].kl_R)


@pytest.mark.parametrize("bias", ["none", "both are trained"])
@pytest.mark.parametrize("part", ["cross-entropy", "all"])
def test_no_tensor_of_all_rows_and_tokens_is_made(part, bias, monkeypatch):
    """Memory is that of a chunk, a piece of it and the gradients, whatever the number of rows."""
    num_rows = 1024
    vocab = 2048
    case = make_case(part, bias=bias, num_rows=num_rows, vocab=vocab)
    chunk_bytes = 64 * vocab * 4
    piece_bytes = 8 * vocab * 4
    monkeypatch.setitem(PIECE_BYTES, "cpu", piece_bytes)
    live = LiveBytes()
    with live:
        case.loss(token_loss, TokenPass(chunk_bytes=chunk_bytes))
    assert live.peak <= chunk_bytes + 8 * piece_bytes + 8 * case.leaves[0].nbytes
    assert chunk_bytes + 8 * piece_bytes < num_rows * vocab * 4 / 4


def test_the_total_variation_of_a_large_vocabulary_is_not_rounded_down():
    torch.manual_seed(0)
    logits_RV, target_RV = torch.randn(2, 8, 32000).mul_(4.5).unbind()
    expected_R = (logits_RV.double().softmax(-1) - target_RV.double().softmax(-1)).abs().sum(-1) / 2
    stats_4R = token_row_loss(
        TokenChunk(
            logits_rV=logits_RV.clone(),
            bias_rV=None,
            transform=LogitTransform(),
            label_r=torch.zeros(8, dtype=torch.long),
            targets=TokenTargets(target_RV, torch.arange(8), target_RV.argmax(-1)),
            terms=TokenTerms(total_variation=1.0),
        ),
        False,
    )
    # The softmax itself errs by 4e-6. A sum in order would err by 6e-5.
    torch.testing.assert_close(stats_4R[3].double(), expected_R, rtol=1e-5, atol=0)
