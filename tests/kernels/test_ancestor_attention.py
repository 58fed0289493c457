"""Attention in Triton is softmax attention written out in float64, gradients included, whatever the shapes and the blocks."""

import pytest
import torch

from engine.kernels import AttentionRows, reference
from engine.kernels.attention_tiles import Tile
from tests.kernels.attention_cases import (
    ANCESTORS,
    HEADS,
    LENGTHS,
    QUERIES,
    AttentionCase,
    make_case,
    with_gradients,
    written_out,
)
from tests.pairwise import pairwise

kernels = pytest.importorskip("engine.kernels.ancestor_attention", reason="the kernel is written in Triton, which is missing")
from engine.kernels import attention_members  # noqa: E402  requires Triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the interpreter runs it, see conftest.py

# head dim, heads and ancestors; two of the head dims are padded
SHAPES = {10: ("MHA", "chains"), 64: ("GQA", "chains"), 80: ("MQA", "a tree"), 128: ("GQA", "one each")}
LAYOUTS = {
    "heads before rows": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of a wider row": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "last dimension apart": lambda x: x.mT.contiguous().mT,
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows and of keys in a dozen tokens, with and without masks; a GPU multiplies no block under 16."""
    tile = Tile(16, 8, 1, 1) if DEVICE == "cpu" else Tile(16, 16, 4, 1)
    monkeypatch.setattr(attention_members, "tile_of", lambda *_: tile)


def assert_equals_written_out(case: AttentionCase, attention=kernels.ancestor_attention) -> None:
    output, lse, grads = with_gradients(attention, case, device=DEVICE)
    expected, expected_lse, expected_grads = with_gradients(written_out, case, torch.float64)
    for ours, theirs in zip((output, lse, *grads), (expected, expected_lse, *expected_grads), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def assert_errs_at_most_twice_as_the_reference(case: AttentionCase, dtype: torch.dtype) -> None:
    """The reference rounds results alone; a kernel also rounds what it multiplies, and adds in another order."""
    case = AttentionCase(*case.arguments(dtype)[0])  # values that the dtype can hold, the same to all three
    exact, exact_lse, exact_grads = with_gradients(written_out, case, torch.float64)
    ours, lse, grads = with_gradients(kernels.ancestor_attention, case, device=DEVICE)
    plain, _, plain_grads = with_gradients(reference.ancestor_attention, case, device=DEVICE)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    for own, plainly, true in zip((ours, *grads), (plain, *plain_grads), (exact, *exact_grads), strict=True):
        assert own.dtype == dtype
        # the last term is for fp32 alone: a GPU's exponential errs by 2**-22, and differences of scores magnify it
        assert (own - true).norm() <= 2 * (plainly - true).norm() + 1e-5 * true.norm()


@pairwise(lengths=LENGTHS, heads=HEADS, queries=QUERIES, ancestors=ANCESTORS)
def test_attention_is_one_masked_softmax_over_prefix_and_ancestors(small_blocks, lengths, heads, queries, ancestors):
    lengths = LENGTHS[lengths]
    assert_equals_written_out(make_case(lengths, HEADS[heads], QUERIES[queries](sum(lengths)), ANCESTORS[ancestors]))


@pytest.mark.parametrize("head_dim", SHAPES)
def test_any_head_dim_will_do(small_blocks, head_dim):
    heads, ancestors = SHAPES[head_dim]
    assert_equals_written_out(make_case((1, 13), HEADS[heads], torch.arange(14), ANCESTORS[ancestors], head_dim))


@pytest.mark.parametrize("head_dim", SHAPES)
def test_fp16_errs_at_most_twice_as_much_as_plain_pytorch(small_blocks, head_dim):
    heads, ancestors = SHAPES[head_dim]
    case = make_case((7, 14), HEADS[heads], torch.arange(21), ANCESTORS[ancestors], head_dim)
    assert_errs_at_most_twice_as_the_reference(case, torch.float16)


def test_blocks_may_be_larger_than_the_batch():
    assert_equals_written_out(make_case((3, 1, 9), (6, 2), torch.arange(13), (2, False), 64))


def test_a_group_may_have_more_heads_than_a_block_has_members(small_blocks):
    assert_equals_written_out(make_case((3, 6), (20, 1), torch.arange(9), (1, False)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_may_be_views(small_blocks, layout):
    def attention(query, key, value, extra_keys, extra_values, rows):
        view = LAYOUTS[layout]
        extras = [[view(extra) for extra in extras] for extras in (extra_keys, extra_values)]
        return kernels.ancestor_attention(view(query), view(key), view(value), *extras, rows)

    assert_equals_written_out(make_case((4, 9), (4, 2), torch.arange(13), (2, False)), attention)


def test_the_gradient_may_be_expanded_and_the_log_sum_exp_has_none(small_blocks):
    case = make_case((5,), (2, 1), torch.arange(5), (1, False))
    (arguments, leaves), (same, same_leaves) = case.arguments(device=DEVICE), case.arguments(device=DEVICE)
    output, lse = kernels.ancestor_attention(*arguments)
    grads = torch.autograd.grad(output.sum(), leaves)
    expected = torch.autograd.grad(reference.ancestor_attention(*same)[0].sum(), same_leaves)
    assert not lse.requires_grad
    torch.testing.assert_close(grads, expected)


def test_leaving_out_rows_leaves_the_others_as_they_were(small_blocks):
    every = make_case((4, 9, 1), (4, 2), torch.arange(14), (3, False))
    kept_Q = torch.tensor([0, 5, 6, 12, 13], device=DEVICE)
    (query, *keys, rows), _ = every.arguments(device=DEVICE)
    some = AttentionRows(rows.position_Q[kept_Q], rows.cu_seqlens, tuple(ancestor_Q[kept_Q] for ancestor_Q in rows.ancestors))
    output, lse = kernels.ancestor_attention(query, *keys, rows)
    some_output, some_lse = kernels.ancestor_attention(query[kept_Q], *keys, some)
    torch.testing.assert_close(some_output, output[kept_Q])
    torch.testing.assert_close(some_lse, lse[kept_Q])


@pytest.mark.parametrize("ancestors", ["chains", "a tree"])
def test_two_runs_agree_bit_for_bit(small_blocks, ancestors):
    case = make_case((6, 11), (4, 2), torch.arange(17), ANCESTORS[ancestors])
    one, other = (with_gradients(kernels.ancestor_attention, case, device=DEVICE) for _ in range(2))
    assert all(torch.equal(mine, yours) for mine, yours in zip((*one[:2], *one[2]), (*other[:2], *other[2]), strict=True))


def test_scores_of_a_thousand_stay_finite(small_blocks):
    case = make_case((5, 9), (2, 1), torch.arange(14), (2, False), scale=30.0)
    output, lse, grads = with_gradients(kernels.ancestor_attention, case, device=DEVICE)
    assert lse.abs().max() > 1000
    assert all(tensor.isfinite().all() for tensor in (output, lse, *grads))


def test_a_head_dim_beyond_the_kernels_is_named():
    arguments, _ = make_case((2,), (1, 1), torch.arange(2), head_dim=300).arguments(device=DEVICE)
    with pytest.raises(ValueError, match="at most 256"):
        kernels.ancestor_attention(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the kernels are interpreted above, not compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiled_for_a_gpu_it_errs_at_most_twice_as_much_as_plain_pytorch(dtype):
    for head_dim, ancestors in ((64, (0, False)), (80, (3, True)), (128, (6, False)), (256, (2, False))):
        for heads in ((8, 2), (6, 2), (2, 2)):
            position_Q = torch.arange(882)[torch.arange(882) % 7 != 3]
            case = make_case((300, 1, 517, 64), heads, position_Q, ancestors, head_dim)
            assert_errs_at_most_twice_as_the_reference(case, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: there is nothing to wait for")
@pytest.mark.parametrize("ancestors", ["no ancestor", "chains", "a tree"])
def test_nothing_waits_for_the_device(ancestors):
    arguments, leaves = make_case((5, 8), (4, 2), torch.arange(13), ANCESTORS[ancestors], 64).arguments(device=DEVICE)

    def step() -> None:
        torch.autograd.grad(kernels.ancestor_attention(*arguments)[0].sum(), leaves)

    step()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
