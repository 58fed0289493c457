"""Flash attention over the prefix merged with the rows' ancestors is softmax attention written out in float64, gradients too.

On a CPU Triton's interpreter runs the merge, see conftest.py, and plain_flash.py stands in for flash attention.
"""

from dataclasses import replace

import pytest
import torch

from engine.kernels import flash, reference
from tests.kernels.attention_cases import ANCESTORS, HEADS, AttentionCase, make_case, with_gradients, written_out
from tests.pairwise import pairwise

kernels = pytest.importorskip("engine.kernels.prefix_flash", reason="the merge is written in Triton, which is not installed")
from tests.kernels.plain_flash import PLAIN  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# documents: tokens, the first row's place among them, rows
LAYOUTS = {
    "every row": ((13, 0, 13),),
    "starting late, ending early": ((13, 4, 6),),
    "several": ((1, 0, 1), (6, 0, 0), (1, 0, 0), (11, 3, 8), (2, 0, 1), (5, 1, 3)),
    "one row of several": ((3, 0, 0), (7, 5, 1), (2, 0, 0)),
    "one token": ((1, 0, 1),),
    "no row": ((4, 0, 0), (1, 0, 0)),
}
# blocks of flash attention are of 128 at most
LONG = {"long": ((200, 37, 150), (1, 0, 1), (129, 0, 0), (300, 0, 300), (65, 64, 1), (131, 0, 130))}


def case_of(layout, heads="GQA", ancestors="chains", head_dim=16, scale=1.0) -> AttentionCase:
    positions = []
    start = 0
    for length, first, count in (documents := (LAYOUTS | LONG)[layout]):
        positions += range(start + first, start + first + count)
        start += length
    return make_case(
        [length for length, *_ in documents],
        HEADS[heads],
        torch.tensor(positions).long(),
        ANCESTORS[ancestors],
        head_dim,
        scale,
    )


@pytest.fixture
def plain_prefix(monkeypatch):
    monkeypatch.setattr(flash, "available_flash", lambda: PLAIN)


def assert_equals_written_out(case: AttentionCase, tolerance: float = 1e-5) -> None:
    result = with_gradients(kernels.ancestor_attention, case, device=DEVICE)
    expected = with_gradients(written_out, case, torch.float64)
    for ours, theirs in zip((*result[:2], *result[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def assert_errs_at_most_twice_as_plain_pytorch(case: AttentionCase, dtype: torch.dtype) -> None:
    case = AttentionCase(*case.arguments(dtype)[0])  # with the values that this precision can hold
    exact = with_gradients(written_out, case, torch.float64)
    plain = with_gradients(written_out, case, dtype)
    ours = with_gradients(kernels.ancestor_attention, case, dtype, DEVICE)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=1e-5)
    for mine, plainly, theirs in zip(*([output, *grads] for output, _, grads in (ours, plain, exact)), strict=True):
        assert mine.dtype == dtype
        # where plain PyTorch subtracts a number from itself, kernels may round it in fp32 twice
        floor = 1e-6 * theirs.numel() ** 0.5
        assert (mine - theirs).norm() <= 2 * (plainly - theirs).norm() + floor


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs for a dozen rows, the last of them not full."""
    monkeypatch.setattr(kernels, "TILE", 128)


@pytest.mark.parametrize("ancestors", ANCESTORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefix_and_ancestors_share_one_softmax(plain_prefix, small_tiles, layout, ancestors):
    assert_equals_written_out(case_of(layout, ancestors=ancestors))


@pytest.mark.parametrize("ancestors", ANCESTORS)
@pytest.mark.parametrize("heads", HEADS)
def test_heads_of_a_group_share_keys(plain_prefix, heads, ancestors):
    assert_equals_written_out(case_of("several", heads, ancestors))


@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 128])
def test_any_head_dim_that_flash_attention_takes(plain_prefix, head_dim):
    assert_equals_written_out(case_of("several", head_dim=head_dim))


@pytest.mark.parametrize("ancestors", ANCESTORS)
@pytest.mark.parametrize("layout", ["starting late, ending early", "several", "one token"])
def test_in_fp16_it_errs_at_most_twice_as_much_as_plain_pytorch(plain_prefix, layout, ancestors):
    assert_errs_at_most_twice_as_plain_pytorch(case_of(layout, ancestors=ancestors, head_dim=64), torch.float16)


@pytest.mark.parametrize("ancestors", ["chains", "a tree"])
def test_what_is_returned_is_what_the_reference_returns(plain_prefix, ancestors):
    arguments, _ = case_of("several", ancestors=ancestors).arguments(device=DEVICE)
    for ours, theirs in zip(kernels.ancestor_attention(*arguments), reference.ancestor_attention(*arguments), strict=True):
        assert (ours.shape, ours.dtype, ours.requires_grad) == (theirs.shape, theirs.dtype, theirs.requires_grad)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ancestors", ["chains", "a tree"])
def test_scores_of_a_thousand_stay_finite(plain_prefix, ancestors):
    case = case_of("several", ancestors=ancestors, scale=32.0)
    output, lse, grads = with_gradients(kernels.ancestor_attention, case, device=DEVICE)
    exact, exact_lse, _ = with_gradients(written_out, case, torch.float64)
    assert exact_lse.max() > 1000 and all(x.isfinite().all() for x in (output, lse, *grads))
    # a score of 4000 is rounded by 2e-4, its weight by as much of itself
    torch.testing.assert_close(output.double(), exact, rtol=1e-3, atol=32e-3)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=0)


def test_inputs_need_not_be_dense(plain_prefix):
    case = case_of("several")
    strided = AttentionCase(*(torch.stack((x, x), -1)[..., 0] if torch.is_tensor(x) else x for x in vars(case).values()))
    arguments = [x.detach() if torch.is_tensor(x) else x for x in vars(strided).values()]
    for ours, theirs in zip(kernels.ancestor_attention(*arguments), written_out(*vars(case).values()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_flash_attention_is_told_the_longest_document_and_not_the_pack(monkeypatch):
    seen = []

    def forward(inputs):
        seen.append(inputs.segments[2:])
        return PLAIN.forward(inputs)

    def backward(inputs, *others):
        seen.append(inputs.segments[2:])
        return PLAIN.backward(inputs, *others)

    monkeypatch.setattr(flash, "available_flash", lambda: replace(PLAIN, forward=forward, backward=backward))
    case = case_of("several")
    for longest, expected in ((11, (11, 11)), (None, (13, 26))):
        seen.clear()
        case = replace(case, rows=replace(case.rows, longest=longest))
        assert_equals_written_out(case)
        assert seen == [expected] * 2


def test_without_ancestors_no_kernel_is_launched(plain_prefix, monkeypatch):
    monkeypatch.setattr(kernels, "_merge_kernel", None)
    monkeypatch.setattr(kernels, "_merge_backward_kernel", None)
    assert_equals_written_out(case_of("several", ancestors="no ancestor"))


def test_refusals_say_why(monkeypatch):
    monkeypatch.setattr(flash, "refusal", lambda dtype, device: "as flash attention says")
    assert kernels.refusal(torch.bfloat16, 256, torch.device("cuda")) == "as flash attention says"
    for head_dim in (264, 60):
        assert f"not {head_dim}" in kernels.refusal(torch.bfloat16, head_dim, torch.device("cuda"))
    monkeypatch.setattr(flash, "available_flash", lambda: None)
    with pytest.raises(ValueError, match="neither"):
        kernels.ancestor_attention(*case_of("several").arguments()[0])


@pytest.mark.gpu
@pairwise(
    layout=["long", "several", "one row of several", "one token"],
    ancestors=ANCESTORS,
    dtype=[torch.bfloat16, torch.float16],
)
def test_on_a_gpu_it_errs_at_most_twice_as_much_as_plain_pytorch(real_flash, layout, ancestors, dtype):
    assert_errs_at_most_twice_as_plain_pytorch(case_of(layout, ancestors=ancestors, head_dim=128), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 64, 80, 256])
@pytest.mark.parametrize("heads", HEADS)
def test_on_a_gpu_any_heads_and_head_dim(real_flash, heads, head_dim):
    assert_errs_at_most_twice_as_plain_pytorch(case_of("long", heads, head_dim=head_dim), torch.bfloat16)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device(real_flash):
    arguments, leaves = case_of("long", head_dim=64).arguments(torch.bfloat16, DEVICE)
    torch.autograd.grad(kernels.ancestor_attention(*arguments)[0].sum(), leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(kernels.ancestor_attention(*arguments)[0].sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
