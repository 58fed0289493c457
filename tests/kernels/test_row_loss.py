"""The fused loss of a chunk's rows is the loss written out, gradients included, whatever the rows, the dtype and the block."""

from dataclasses import dataclass, replace

import pytest
import torch

from engine.kernels.interface import LossChunk
from engine.kernels.reference import TINY

kernel = pytest.importorskip("engine.kernels.row_loss", reason="the kernel is written in Triton, which is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the interpreter runs it, see conftest.py

SLOTS = 5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# vocabulary and block: less than one block, two whole ones, a prime over four, and a prime just above the block that is used
BLOCKS = {"narrow": (37, 64), "even": (64, 32), "prime": (97, 32), "wide": (4099, None)}
PARTS = {"kl": (1.0, 0.0, 0.0), "alpha": (0.0, 1.0, 0.0), "lambda": (0.6, 0.0, 0.8), "all": (1.0, 0.5, 0.25)}


@dataclass(frozen=True)
class Rows:
    """The arguments of `row_loss` that are tensors."""

    logits_rU: torch.Tensor
    target_nU: torch.Tensor
    slot_r: torch.Tensor
    lse_n: torch.Tensor
    draft_id_n: torch.Tensor
    weight_3r: torch.Tensor

    def chunk(self, mixes: bool) -> LossChunk:
        return LossChunk(*vars(self).values(), sizes=[], mixes=mixes)  # the kernel reads slots, not sizes

    def loss(self, with_gradients: bool = True, mixes: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Statistics, and what stands in place of the logits."""
        logits_rU = self.logits_rU.clone()
        return kernel.row_loss(replace(self, logits_rU=logits_rU).chunk(mixes), with_gradients), logits_rU

    def take(self, index: torch.Tensor) -> "Rows":
        picked = self.logits_rU[index], self.slot_r[index], self.weight_3r[:, index].contiguous()
        return replace(self, logits_rU=picked[0], slot_r=picked[1], weight_3r=picked[2])


def make_rows(
    vocab: int = 37, num_rows: int = 7, dtype: torch.dtype = torch.float32, part: str = "all", scale: float = 1.0
) -> Rows:
    """Rows of any slot in any order, every fifth one silent; drafts near enough to their targets that some are right."""
    g = torch.Generator().manual_seed(4)
    full_nV = torch.randn(SLOTS, vocab + 3, generator=g) * 2 * scale
    target_nU = full_nV[:, :vocab].to(dtype)
    slot_r = torch.randint(SLOTS, (num_rows,), generator=g)
    logits_rU = target_nU[slot_r].float() + torch.randn(num_rows, vocab, generator=g) * scale
    slot_r[4::5] = -1
    weight_3r = torch.rand(3, num_rows, generator=g) * torch.tensor(PARTS[part])[:, None]
    tensors = logits_rU.to(dtype), target_nU, slot_r, full_nV.logsumexp(1), target_nU.argmax(1), weight_3r
    return Rows(*(tensor.to(DEVICE) for tensor in tensors))


def written_out(rows: Rows, leaf: torch.dtype, precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics, and by autograd the gradient of logits of dtype `leaf`: row by row, computed at this precision."""
    logits_rU = rows.logits_rU.to(leaf, copy=True).requires_grad_()
    stats_4r = torch.zeros(4, logits_rU.shape[0], dtype=precision, device=DEVICE)
    total = logits_rU.sum() * 0
    for row, slot in enumerate(rows.slot_r.tolist()):
        if slot < 0:
            continue
        z_U = logits_rU[row].to(precision)
        t_U = rows.target_nU[slot].to(precision)
        log_q_U = z_U.log_softmax(0)
        cross_entropy = -(t_U.softmax(0) @ log_q_U)
        acceptance = torch.minimum((t_U - rows.lse_n[slot].to(precision)).exp(), log_q_U.exp()).sum()
        log_acceptance = -acceptance.clamp_min(TINY).log()
        correct = z_U[rows.draft_id_n[slot]] >= z_U.max()
        stats_4r[:, row] = torch.stack((cross_entropy, log_acceptance, acceptance, correct)).detach()
        parts = torch.stack((cross_entropy, log_acceptance, 1 - acceptance))
        total = total + rows.weight_3r[:, row].to(precision) @ parts
    total.backward()
    return stats_4r, logits_rU.grad


def exact(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    return written_out(rows, torch.float64, torch.float64)


@pytest.fixture(params=BLOCKS)
def vocab(request, monkeypatch) -> int:
    size, block = BLOCKS[request.param]
    if block is not None:
        monkeypatch.setattr(kernel, "MAX_BLOCK_U", block)
    return size


@pytest.mark.parametrize("part", PARTS)
def test_statistics_and_gradients_are_those_of_one_row_at_a_time_in_float64(part, vocab):
    rows = make_rows(vocab, part=part)
    for ours, theirs in zip(rows.loss(mixes=part != "kl"), exact(rows), strict=True):
        # exp(x) carries the rounding of x, some 20 here: 1e-6 of it, and of p and q before their difference
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", PARTS)
def test_in_fp16_it_errs_at_most_twice_as_much_as_plain_pytorch(part, vocab):
    rows = make_rows(vocab, dtype=torch.float16, part=part)
    plain = written_out(rows, torch.float16, torch.float32)
    for ours, plainly, theirs in zip(rows.loss(mixes=part != "kl"), plain, exact(rows), strict=True):
        # statistics leave in fp32, where both errors are a few roundings of numbers near 1
        assert (ours - theirs).norm() <= 2 * (plainly - theirs).norm() + 1e-6 * theirs.norm()


@pytest.mark.parametrize("part", PARTS)
def test_in_bf16_gradients_are_those_of_float64_to_the_last_bit(part, vocab):
    rows = make_rows(vocab, dtype=torch.bfloat16, part=part)
    # the bit is 2**-7: Triton's interpreter cuts off what a GPU rounds to half of that
    torch.testing.assert_close(rows.loss(mixes=part != "kl")[1].double(), exact(rows)[1], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_target_in_fp32_gives_what_the_same_target_gives_at_half_precision(dtype):
    rows = make_rows(dtype=dtype)
    wide = replace(rows, target_nU=rows.target_nU.float())
    assert all(torch.equal(one, other) for one, other in zip(rows.loss(), wide.loss(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_take_the_place_and_dtype_of_the_logits_and_only_if_asked_for(dtype):
    rows = make_rows(dtype=dtype)
    stats_4r, untouched_rU = rows.loss(with_gradients=False)
    expected_4r, gradient_rU = rows.loss()
    assert torch.equal(stats_4r, expected_4r) and torch.equal(untouched_rU, rows.logits_rU)
    assert gradient_rU.dtype == dtype and not torch.equal(gradient_rU, rows.logits_rU)


def test_silent_rows_have_neither_statistics_nor_gradients(vocab):
    rows = make_rows(vocab)
    silent = replace(rows, slot_r=torch.full_like(rows.slot_r, -1))
    nothing = replace(silent, target_nU=rows.target_nU[:0], lse_n=rows.lse_n[:0], draft_id_n=rows.draft_id_n[:0])
    silent_r = rows.slot_r < 0
    assert silent_r.any() and not silent_r.all()
    for stats_4r, gradient_rU in (rows.loss(), rows.loss(mixes=False)):
        assert not stats_4r[:, silent_r].any() and not gradient_rU[silent_r].any()
    for stats_4r, gradient_rU in (silent.loss(), nothing.loss()):
        assert not stats_4r.any() and not gradient_rU.any()


@pytest.mark.parametrize("num_rows", [1, SLOTS - 1, 3 * SLOTS, 3 * SLOTS + 2])
def test_what_a_row_gets_does_not_depend_on_the_rows_beside_it(num_rows):
    rows = make_rows(num_rows=num_rows)
    shuffled_r = torch.randperm(num_rows, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    stats_4r, gradient_rU = rows.loss()
    for index_r in (shuffled_r, torch.arange(num_rows, device=DEVICE)[-1:]):
        other_4r, other_rU = rows.take(index_r).loss()
        assert torch.equal(other_4r, stats_4r[:, index_r]) and torch.equal(other_rU, gradient_rU[index_r])


def test_no_rows_give_no_statistics():
    stats_4r, gradient_rU = make_rows(num_rows=0).loss()
    assert stats_4r.shape == (4, 0) and gradient_rU.shape == (0, 37)


def test_padded_rows_are_read_and_written_only_as_far_as_the_vocabulary_goes():
    rows = make_rows()
    padded_rW = torch.nn.functional.pad(rows.logits_rU, (0, 3), value=7.0)
    target_nW = torch.nn.functional.pad(rows.target_nU, (0, 5), value=7.0)
    inside = replace(rows, target_nU=target_nW[:, :37])
    stats_4r = kernel.row_loss(replace(inside, logits_rU=padded_rW[:, :37]).chunk(True), True)
    expected_4r, gradient_rU = rows.loss()
    assert torch.equal(stats_4r, expected_4r) and torch.equal(padded_rW[:, :37], gradient_rU) and (padded_rW[:, 37:] == 7).all()


@pytest.mark.parametrize("scale", [8.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", ["narrow", "prime"], indirect=True)
def test_saturated_logits_give_finite_statistics_and_gradients(dtype, scale, vocab):
    rows = make_rows(vocab, dtype=torch.float32, scale=scale)
    logits_rU, target_nU = (x.clamp(-6e4, 6e4).to(dtype) for x in (rows.logits_rU, rows.target_nU))  # of fp16: 65504
    rows = replace(rows, logits_rU=logits_rU, target_nU=target_nU, lse_n=target_nU.float().logsumexp(1))
    for mixes in (True, False):
        assert all(tensor.isfinite().all() for tensor in rows.loss(mixes=mixes))
    torch.testing.assert_close(rows.loss()[0].double(), exact(rows)[0], rtol=1e-4, atol=1e-6)


def test_where_acceptance_is_below_the_least_normal_number_nothing_pulls():
    """As `clamp_min` has it. One row accepts nothing, the other exp(-88), which its gradient would be divided by."""
    rows = make_rows(num_rows=2, part="alpha")
    logits_rU = torch.full_like(rows.logits_rU, -1e4)
    target_nU = torch.full_like(rows.target_nU, -1e4)
    logits_rU[:, 0], logits_rU[1, 1], target_nU[:, 1] = 88.0, 0.0, 0.0
    rows = replace(rows, logits_rU=logits_rU, target_nU=target_nU, lse_n=torch.full_like(rows.lse_n, 87.6))
    stats_4r, gradient_rU = rows.loss()
    assert (stats_4r[2] <= TINY).all() and stats_4r[1].tolist() == pytest.approx([87.3365] * 2) and not gradient_rU.any()


def test_a_tie_pulls_nowhere():
    """q = (1/2, 1/2) and p_full = (1/2, 0): the first is not below, whereas it would pull by a quarter if it were."""
    one = torch.zeros(1, dtype=torch.long, device=DEVICE)
    target_nU = torch.tensor([[0.0, -200.0]], device=DEVICE)
    weight_3r = torch.tensor([[0.0], [0.0], [1.0]], device=DEVICE)
    rows = Rows(torch.zeros(1, 2, device=DEVICE), target_nU, one, torch.full_like(weight_3r[0], 2).log(), one, weight_3r)
    stats_4r, gradient_rU = rows.loss()
    assert stats_4r[2].item() == 0.5 and stats_4r[3].item() == 1 and not gradient_rU.any()
    assert replace(rows, lse_n=rows.lse_n - 1e-3).loss()[1][0].tolist() == pytest.approx([-0.25, 0.25])


def test_absent_parts_are_not_looked_at():
    rows = make_rows(part="kl")
    nan_3r = torch.full((3, 7), torch.nan, device=DEVICE)
    nan_3r[0] = rows.weight_3r[0]
    for ours, theirs in zip(replace(rows, weight_3r=nan_3r).loss(mixes=False), rows.loss(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_row_that_is_not_a_number_says_so():
    rows = make_rows(part="alpha")
    rows.logits_rU[1, 7] = torch.nan
    stats_4r, gradient_rU = rows.loss()
    assert stats_4r[:3, 1].isnan().all() and gradient_rU[1].isnan().all()
    assert stats_4r[:, 2:].isfinite().all() and gradient_rU[2:].isfinite().all()


def test_two_runs_agree_bit_for_bit(vocab):
    rows = make_rows(vocab)
    assert all(torch.equal(one, other) for one, other in zip(rows.loss(), rows.loss(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the kernel is interpreted above, not compiled")
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_for_a_gpu_it_errs_at_most_twice_as_much_as_plain_pytorch(dtype):
    for size in (32000, 32003):
        for part in PARTS:
            rows = make_rows(size, 40, dtype, part)
            plain = written_out(rows, dtype, torch.float32)
            for ours, plainly, theirs in zip(rows.loss(mixes=part != "kl"), plain, exact(rows), strict=True):
                # a GPU's own exp errs by 1e-6, and may so tip a token whose q and p_full are that near to the other side
                assert (ours - theirs).norm() <= 2 * (plainly - theirs).norm() + 1e-4 * theirs.norm()
