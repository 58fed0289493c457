"""The loss in chunks is the loss written out, gradients included, whatever the rows, the parts and the chunk."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import LossRows, RowWeights, SlotTargets, VocabLoss, reference
from engine.kernels.vocab_loss import LossPass, vocab_loss
from engine.models.losses.jensen_shannon import jensen_shannon
from engine.models.losses.total_variation import total_variation
from tests.live_bytes import LiveBytes
from tests.pairwise import pairwise

STEPS = 3
SLOTS = 23
HIDDEN = 12
DRAFT_VOCAB = 37
VOCAB = 61
WEIGHTS = {
    "kl": RowWeights(torch.tensor([1.0, 0.5, 0.25])),
    "alpha": RowWeights(torch.zeros(3), log_acceptance_S=torch.tensor([0.3, 0.2, 0.1])),
    "lambda": RowWeights(torch.tensor([1.0, 0.5, 0.2]), rejection_S=torch.tensor([0.1, 0.2, 0.3])),
    "a step of no weight": RowWeights(torch.tensor([1.0, 0.0, 0.25])),
    "total variation": RowWeights(torch.zeros(3), score_S=torch.tensor([0.3, 0.2, 0.1]), score=total_variation),
    "kl and jensen-shannon": RowWeights(torch.ones(3), score_S=torch.tensor([2.0, 0.0, 1.0]), score=jensen_shannon),
}


def total_variation_of(p_U: torch.Tensor, q_U: torch.Tensor) -> torch.Tensor:
    return 1 - torch.minimum(p_U, q_U).sum()


def jensen_shannon_of(p_U: torch.Tensor, q_U: torch.Tensor) -> torch.Tensor:
    def entropy(x_U: torch.Tensor) -> torch.Tensor:
        return -torch.xlogy(x_U, x_U).sum()

    return entropy((p_U + q_U) / 2) - (entropy(p_U) + entropy(q_U)) / 2


SCORES = {total_variation: total_variation_of, jensen_shannon: jensen_shannon_of}
SHARES = {"every row": 1.1, "some rows": 0.4, "few rows": 0.03, "no row": -1.0}


def fused(*arguments: object) -> VocabLoss:
    """The deferred loss with the Triton kernel, in the interpreter where there is no GPU."""
    kernel = pytest.importorskip("engine.kernels.row_loss", reason="Triton is not installed")
    return vocab_loss(*arguments, loss_pass=LossPass(kernel.row_loss))


IMPLEMENTATIONS = {"reference": reference.vocab_loss, "deferred": vocab_loss, "fused": fused}


def make_targets(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> SlotTargets:
    g = torch.Generator().manual_seed(1)
    head_VD = torch.randn(VOCAB, HIDDEN, generator=g).to(dtype) * scale
    hidden_ND = torch.randn(SLOTS, HIDDEN, generator=g).to(dtype)
    full_NV = (hidden_ND @ head_VD.T).float()

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, head_VD[:DRAFT_VOCAB]).to(torch.promote_types(hidden.dtype, torch.float32))

    return SlotTargets(hidden_ND, logits, full_NV.logsumexp(1), full_NV[:, :DRAFT_VOCAB].argmax(1))


def make_rows(share: float, slots_per_chunk: int) -> LossRows:
    """A random choice of the rows of every step and slot."""
    chosen_SN = torch.rand(STEPS, SLOTS, generator=torch.Generator().manual_seed(2)) < share
    edges = [*range(0, SLOTS, slots_per_chunk), SLOTS]
    bounds = []
    start = 0
    for chosen_N in chosen_SN:
        bounds.append([start + int(chosen_N[:edge].sum()) for edge in edges])
        start = bounds[-1][-1]
    return LossRows(torch.cat([chosen_N.nonzero().flatten() for chosen_N in chosen_SN]), bounds, slots_per_chunk)


def make_draft(num_rows: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """hidden_RD and weight_UD, both to be differentiated."""
    g = torch.Generator().manual_seed(3)
    tensors = torch.randn(num_rows, HIDDEN, generator=g), torch.randn(DRAFT_VOCAB, HIDDEN, generator=g) * scale
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def written_out(hidden_RD, weight_UD, rows: LossRows, targets: SlotTargets, weights: RowWeights) -> tuple[torch.Tensor, list]:
    """The total in float64, row by row, and per row (step, cross-entropy, acceptance, correct)."""
    total = (hidden_RD.sum() + weight_UD.sum()) * 0
    seen = []
    for step, bounds in enumerate(rows.bounds):
        for row in range(bounds[0], bounds[-1]):
            slot = rows.slot_R[row]
            z_U = targets.logits(targets.hidden_ND[slot]).double()
            logits_U = weight_UD @ hidden_RD[row]
            cross_entropy = F.cross_entropy(logits_U, z_U.softmax(0))
            alpha = torch.minimum((z_U - targets.lse_N[slot].double()).exp(), logits_U.softmax(0)).sum()
            total = total + weights.cross_entropy_S[step] * cross_entropy
            if weights.log_acceptance_S is not None:
                total = total - weights.log_acceptance_S[step] * alpha.log()
            if weights.rejection_S is not None:
                total = total + weights.rejection_S[step] * (1 - alpha)
            if weights.score_S is not None:
                total = total + weights.score_S[step] * SCORES[weights.score](z_U.softmax(0), logits_U.softmax(0))
            correct = logits_U.argmax() == targets.draft_id_N[slot]
            seen.append((step, cross_entropy.item(), alpha.item(), bool(correct)))
    return total, seen


@pairwise(implementation=IMPLEMENTATIONS, slots_per_chunk=[1, 7, 100], share=SHARES, parts=WEIGHTS)
def test_sums_and_gradients_are_those_of_one_row_at_a_time_in_float64(parts, share, slots_per_chunk, implementation):
    rows = make_rows(SHARES[share], slots_per_chunk)
    targets = make_targets()
    weights = WEIGHTS[parts]
    draft = make_draft(rows.slot_R.numel())
    result = IMPLEMENTATIONS[implementation](*draft, rows, targets, weights)
    (3 * result.total).backward()

    wide = [tensor.detach().double().requires_grad_() for tensor in draft]
    total, seen = written_out(*wide, rows, targets, weights)
    (3 * total).backward()
    torch.testing.assert_close(result.total.double(), total, rtol=1e-5, atol=1e-6)
    for step in range(STEPS):
        own = [entry for entry in seen if entry[0] == step]
        assert result.correct_S[step] == sum(correct for *_, correct in own)
        expected = [sum(entry[1] for entry in own), sum(entry[2] for entry in own)]
        ours = [result.cross_entropy_S[step].item(), result.acceptance_S[step].item()]
        assert ours == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for ours, theirs in zip(draft, wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("scale", [8.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_saturated_logits_give_finite_losses_and_gradients(implementation, dtype, scale):
    rows = make_rows(0.5, 7)
    targets = make_targets(scale, dtype)
    for weights in WEIGHTS.values():
        draft = make_draft(rows.slot_R.numel(), scale, dtype)
        result = IMPLEMENTATIONS[implementation](*draft, rows, targets, weights)
        result.total.backward()
        assert result.total.isfinite() and result.total.dtype == torch.float32
        assert all(tensor.grad.isfinite().all() and tensor.grad.dtype == dtype for tensor in draft)


@pytest.mark.parametrize("parts", WEIGHTS)
def test_in_bf16_it_errs_at_most_twice_as_much_as_plain_pytorch(parts):
    rows = make_rows(0.8, 7)
    targets = make_targets(dtype=torch.bfloat16)
    weights = WEIGHTS[parts]
    errors = {}
    for name, implementation in IMPLEMENTATIONS.items():
        draft = make_draft(rows.slot_R.numel(), dtype=torch.bfloat16)
        implementation(*draft, rows, targets, weights).total.backward()
        wide = [tensor.detach().double().requires_grad_() for tensor in draft]
        written_out(*wide, rows, targets, weights)[0].backward()
        errors[name] = [(ours.grad - theirs.grad).norm() for ours, theirs in zip(draft, wide, strict=True)]
    for ours, plain in zip(errors["deferred"] + errors["fused"], 2 * errors["reference"], strict=True):
        assert ours <= 2 * plain


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_the_head_s_gradient_adds_up_in_the_precision_asked_for(gradient_dtype):
    rows = make_rows(0.8, 3)
    targets = make_targets(dtype=torch.bfloat16)
    draft = make_draft(rows.slot_R.numel(), dtype=torch.bfloat16)
    vocab_loss(*draft, rows, targets, WEIGHTS["kl"], loss_pass=LossPass(gradient_dtype=gradient_dtype)).total.backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in draft]
    written_out(*wide, rows, targets, WEIGHTS["kl"])[0].backward()
    error = (draft[1].grad - wide[1].grad).norm() / wide[1].grad.norm()
    assert error < 2**-8 * (1 if gradient_dtype == torch.float32 else 4)  # eight chunks add up, each sum rounded


@pytest.mark.parametrize("parts", ["kl", "lambda"])
def test_beyond_a_gradient_and_16_bytes_a_row_its_memory_is_that_of_a_chunk(parts):
    head_UD = torch.randn(DRAFT_VOCAB, HIDDEN)
    slots_per_chunk = 8
    peaks = {}
    for num_chunks in (4, 40):
        num_slots = num_chunks * slots_per_chunk
        bounds = [[step * num_slots + slots_per_chunk * chunk for chunk in range(num_chunks + 1)] for step in range(STEPS)]
        rows = LossRows(torch.arange(num_slots).repeat(STEPS), bounds, slots_per_chunk)
        hidden_ND = torch.randn(num_slots, HIDDEN)
        lse_N = torch.full((num_slots,), 9.0)
        targets = SlotTargets(hidden_ND, lambda hidden_nD: hidden_nD @ head_UD.mT, lse_N, torch.zeros(num_slots).long())
        draft = make_draft(STEPS * num_slots)
        with LiveBytes() as live:
            vocab_loss(*draft, rows, targets, WEIGHTS[parts]).total.backward()
        peaks[num_chunks] = live.peak - STEPS * num_slots * (4 * HIDDEN + 16)
    assert peaks[40] == peaks[4]


@pytest.mark.parametrize("implementation", ["deferred", "fused"])
def test_fp16_gradients_survive_a_loss_divided_by_a_million_slots(implementation):
    rows = make_rows(0.8, 7)
    targets = make_targets(dtype=torch.float16)
    parts = WEIGHTS["lambda"]
    weights = parts.scaled(torch.tensor(1e-6))
    scale = 2.0**20
    draft = make_draft(rows.slot_R.numel(), dtype=torch.float16)
    (scale * IMPLEMENTATIONS[implementation](*draft, rows, targets, weights).total).backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in draft]
    (scale * written_out(*wide, rows, targets, weights)[0]).backward()
    for ours, theirs in zip(draft, wide, strict=True):
        assert (ours.grad - theirs.grad).norm() < 5e-3 * theirs.grad.norm()


def test_without_gradients_it_gives_the_same_sums():
    rows = make_rows(0.5, 7)
    targets = make_targets()
    draft = make_draft(rows.slot_R.numel())
    expected = vocab_loss(*draft, rows, targets, WEIGHTS["kl"])
    with torch.no_grad():
        result = vocab_loss(*draft, rows, targets, WEIGHTS["kl"])
    assert not result.total.requires_grad
    assert torch.equal(result.total, expected.total)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(result.sums, expected.sums, strict=True))


def test_cross_entropy_is_least_and_acceptance_greatest_where_the_draft_is_the_target():
    targets = make_targets()
    weights = RowWeights(torch.ones(1))
    targets = replace(targets, lse_N=targets.logits(targets.hidden_ND).logsumexp(1))
    rows = LossRows(torch.arange(SLOTS), [[0, SLOTS]], SLOTS)
    head_UD = targets.logits(torch.eye(HIDDEN)).T
    same, other = (vocab_loss(hidden, head_UD, rows, targets, weights) for hidden in (targets.hidden_ND, -targets.hidden_ND))
    assert same.acceptance_S.item() == pytest.approx(SLOTS) and same.correct_S.item() == SLOTS
    assert other.acceptance_S < same.acceptance_S and other.cross_entropy_S > same.cross_entropy_S
