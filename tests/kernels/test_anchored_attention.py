"""Attention of draft blocks in Triton is that of the reference, gradients included, whatever the ranges and the blocks."""

import pytest
import torch

from engine.kernels import BlockRows, reference
from engine.kernels.attention_tiles import Tile
from tests.kernels.anchored_cases import KINDS, BlockCase, gradients, make_blocks

kernels = pytest.importorskip("engine.kernels.anchored_attention", reason="the kernel is written in Triton, which is missing")
from engine.kernels import attention_members  # noqa: E402  requires Triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the interpreter runs it, see conftest.py
# Kind, heads, head dim and block size; two of the head dims are padded.
SHAPES = {
    "full": ((6, 2), 10, 3),
    "causal": ((2, 2), 64, 1),
    "window": ((3, 1), 16, 7),
    "causal window": ((4, 2), 80, 4),
    "window of the anchor": ((4, 4), 10, 3),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of rows and keys, with and without masks; a GPU multiplies no block under 16."""
    tile = Tile(16, 8, 1, 1) if DEVICE == "cpu" else Tile(16, 16, 4, 1)
    monkeypatch.setattr(attention_members, "tile_of", lambda *_: tile)


def assert_is_the_reference(case: BlockCase) -> None:
    ours = gradients(kernels.anchored_attention, case, torch.float32, DEVICE)
    expected = gradients(reference.anchored_attention, case, torch.float64)
    for own, true in zip(ours, expected, strict=True):
        torch.testing.assert_close(own.double(), true, rtol=1e-5, atol=1e-5)


def assert_errs_at_most_twice_as_the_reference(case: BlockCase, dtype: torch.dtype) -> None:
    """The reference rounds results alone; a kernel also rounds what it multiplies, and adds in another order."""
    case = case.moved(dtype)  # values that the dtype can hold, the same to all three
    exact = gradients(reference.anchored_attention, case, torch.float64)
    ours = gradients(kernels.anchored_attention, case, dtype, DEVICE)
    plain = gradients(reference.anchored_attention, case, dtype, DEVICE)
    for own, plainly, true in zip(ours, plain, exact, strict=True):
        assert own.dtype == dtype
        # The last term is for fp32 alone: a GPU's exponential errs by 2**-22, and differences of scores magnify it.
        assert (own - true).norm() <= 2 * (plainly - true).norm() + 1e-5 * true.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_one_softmax_over_two_ranges(kind):
    heads, head_dim, block_size = SHAPES[kind]
    assert_is_the_reference(make_blocks(kind, heads, head_dim, block_size))


def test_whole_blocks_of_keys_need_no_mask():
    """Anchors far from the start of their only document; every mask that would apply hides what must be seen."""
    anchors = (20, 22, 31, 33)
    assert_is_the_reference(make_blocks(anchors=anchors, starts=(0,) * 4, block_size=5))
    windows = make_blocks("window of the anchor", anchors=(30, 30, 30, 31), starts=(0,) * 4, block_size=5)
    begin_Q = windows.rows.context_begin_Q - 20
    rows = BlockRows(begin_Q, windows.rows.context_end_Q, windows.rows.own_begin_Q, windows.rows.own_end_Q)
    assert_is_the_reference(BlockCase(windows.leaves, rows))


def test_fp16_errs_at_most_twice_as_much_as_plain_pytorch():
    assert_errs_at_most_twice_as_the_reference(make_blocks("window", head_dim=64), torch.float16)


def test_some_rows_see_the_keys_of_all():
    assert_is_the_reference(make_blocks("causal window").picked(torch.tensor([0, 1, 5, 9, 16])))


def test_a_block_may_be_larger_than_the_batch_and_have_no_context():
    assert_is_the_reference(make_blocks(block_size=1, anchors=(0,), starts=(0,), num_context=0))


def test_no_rows_leave_keys_without_gradients():
    output_QHE, *grads = gradients(kernels.anchored_attention, make_blocks().picked(torch.arange(0)), torch.float32, DEVICE)
    assert output_QHE.shape[0] == 0
    assert not any(grad.any() for grad in grads)


def test_tensors_may_be_views():
    def attention(query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, rows):
        wide_TGE = torch.cat((key_TGE, value_TGE), 1)
        key_TGE, value_TGE = wide_TGE.chunk(2, 1)
        query_QHE = query_QHE.transpose(0, 1).contiguous().transpose(0, 1)
        return kernels.anchored_attention(query_QHE, key_TGE, value_TGE, own_key_PGE.mT.contiguous().mT, own_value_PGE, rows)

    case = make_blocks()
    ours = gradients(attention, case, torch.float32, DEVICE)
    expected = gradients(reference.anchored_attention, case, torch.float64)
    for own, true in zip(ours, expected, strict=True):
        torch.testing.assert_close(own.double(), true, rtol=1e-5, atol=1e-5)


def test_two_runs_agree_bit_for_bit():
    case = make_blocks("causal", block_size=2)
    one, other = (gradients(kernels.anchored_attention, case, torch.float32, DEVICE) for _ in range(2))
    assert all(torch.equal(mine, yours) for mine, yours in zip(one, other, strict=True))


def test_scores_of_a_thousand_stay_finite():
    case = make_blocks("window", scale=30.0)
    assert all(tensor.isfinite().all() for tensor in gradients(kernels.anchored_attention, case, torch.float32, DEVICE))


@pytest.mark.parametrize("kind", ["causal window", "window"])
def test_rows_outside_the_bounds_of_a_block_of_keys_see_none_of_it(kind):
    """The bounds on which the gradients of keys rely, for every block of keys and every row."""
    case = make_blocks(kind)
    for segment in kernels._Attention(*case.leaves, case.rows).segments():
        for index, bounds in enumerate(segment.row_bounds(4).T.tolist()):
            first, whole, masked, last = bounds
            key_K = torch.arange(index * 4, min(index * 4 + 4, len(segment.key_KGE)))
            seen_QK = (key_K >= segment.begin_Q[:, None]) & (key_K < segment.end_Q[:, None])
            assert not seen_QK[:first].any() and not seen_QK[max(last, 0) :].any()
            assert seen_QK[whole:masked].all()
            assert first >= last or first <= whole <= masked <= last


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the kernels are interpreted above, not compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiled_for_a_gpu_it_errs_at_most_twice_as_much_as_plain_pytorch(dtype, monkeypatch):
    monkeypatch.undo()
    anchors = tuple(range(1, 900, 7))
    starts = tuple(0 if anchor < 500 else 500 for anchor in anchors)
    for kind, heads, head_dim in (("full", (8, 2), 128), ("causal window", (6, 2), 80), ("window", (2, 2), 64)):
        case = make_blocks(kind, heads, head_dim, 16, anchors, starts, 901)
        assert_errs_at_most_twice_as_the_reference(case, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: there is nothing to wait for")
def test_nothing_waits_for_the_device():
    case = make_blocks("window", head_dim=64).moved(torch.float16, DEVICE)
    leaves = [leaf.requires_grad_() for leaf in case.leaves]

    def step() -> None:
        torch.autograd.grad(kernels.anchored_attention(*leaves, case.rows).sum(), leaves)

    step()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
