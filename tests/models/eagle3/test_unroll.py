"""The training-time test against docs/ttt.md, written out row by row in float64 (see slow_ttt.py)."""

import warnings
from dataclasses import replace

import pytest
import torch

from engine.batch import LossNorms
from engine.config.sections import LossSection, TttSection
from engine.kernels import PLAIN, Kernels
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.unroll import unroll
from engine.models.normaliser import Normaliser
from engine.models.training_rows import loss_rows
from engine.parallel.mesh import World
from tests.paths import triton_kernels
from tests.slow_ttt import slow_allowed, slow_losses
from tests.tasks import ALIGNMENTS, MASKS, Task, make_documents
from tests.tiny import make_draft, make_micro, make_test


def draft_with(**changes: object) -> Eagle3Draft:
    """A draft whose norms are away from one."""
    config = replace(make_draft().config, **changes)
    torch.manual_seed(3)
    draft = Eagle3Draft(config)
    for parameter in draft.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return draft


def gradients(draft: Eagle3Draft) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in draft.named_parameters()}
    draft.zero_grad()
    return found


def total(task: Task, loss_S: torch.Tensor) -> torch.Tensor:
    return (loss_S * loss_S.new_tensor(task.test.step_weights)).sum()


SHAPES = {
    "one layer": {},
    "three layers": {"num_hidden_layers": 3},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "two layers, normed output": {"num_hidden_layers": 2, "norm_output": True},
    "narrower than its target": {"hidden_size": 24},
    "wider than its target, one head of keys": {"hidden_size": 40, "num_key_value_heads": 1},
    "as many heads of keys as of queries": {"num_key_value_heads": 4, "head_dim": 6},
}
LOSSES = {
    "kl": {},
    "sharp target": {"temperature": 0.4},
    "soft target": {"temperature": 3.0},
    "lk_alpha": {"kind": "lk_alpha"},
    "lk_lambda": {"kind": "lk_lambda", "lk_kl_scale": 0.7, "lk_kl_decay": 3.0},
}
CASES = [(shape, "kl", "inference", 3) for shape in SHAPES] + [("one layer", loss, "specforge", 2) for loss in LOSSES]
CASES += [("two layers, normed output", "lk_lambda", "inference", 7), ("one layer", "kl", "specforge", 1)]


@pytest.mark.parametrize("shape, loss, alignment, steps", CASES)
def test_losses_and_gradients_are_those_of_one_row_at_a_time_in_float64(shape, loss, alignment, steps):
    task = Task(TttSection(steps=steps, mask_alignment=alignment), LossSection(**LOSSES[loss]))
    draft = draft_with(**SHAPES[shape])
    micro = task.micro(make_documents((1, 9, 2, 7), "reply", 11))
    norms = LossNorms(torch.tensor(5.0), torch.arange(1, steps + 1).float())
    output = task.test(draft, micro, norms)
    output.loss.backward()
    ours = gradients(draft)

    slow, weights = slow_losses(draft, micro, task)
    slow_S = torch.stack([_written_out(task.loss, rows, norms, step) for step, rows in enumerate(slow)])
    total(task, slow_S).backward()
    assert output.num_allowed_rows_S.tolist() == [len(rows) for rows in slow]
    assert output.num_loss_rows_S.tolist() == [sum(row.carries_loss for row in rows) for rows in slow]
    assert output.num_correct_S.tolist() == [sum(row.correct for row in rows) for rows in slow]
    torch.testing.assert_close(output.accepted_S.double(), _sums(slow), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss_S.double(), slow_S, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss.double(), total(task, slow_S), rtol=1e-5, atol=1e-6)
    for name, weight in weights.items():
        error = (ours[name].double() - weight.grad).norm() / weight.grad.norm()
        assert error < 2e-5, f"{name}: {error:.1e}"


def _sums(slow) -> torch.Tensor:
    kept = [[row.acceptance.detach() for row in rows if row.carries_loss] for rows in slow]
    return torch.stack([torch.stack(values).sum() if values else torch.zeros((), dtype=torch.float64) for values in kept])


def _written_out(loss: LossSection, rows, norms: LossNorms, step: int) -> torch.Tensor:
    """The step's loss from its rows: cross-entropy over slots, and LK means over the rows with loss."""
    rows = [row for row in rows if row.carries_loss]
    if not rows:
        return torch.zeros((), dtype=torch.float64, requires_grad=True)
    cross_entropy = sum(row.cross_entropy for row in rows) / norms.slots.item()
    alphas = torch.stack([row.acceptance for row in rows])
    count = norms.loss_rows_S[step].item()
    if loss.kind == "kl":
        return cross_entropy
    if loss.kind == "lk_alpha":
        return -alphas.log().sum() / count
    weight = loss.lk_kl_scale * torch.exp(-loss.lk_kl_decay * alphas.detach().sum() / count)
    return weight * cross_entropy + (1 - weight) * (1 - alphas).sum() / count


@pytest.mark.parametrize("shape", ["one layer", "three layers", "EAGLE-3.1"])
@pytest.mark.parametrize("mask", MASKS)
def test_leaving_out_rows_changes_nothing(mask, shape):
    results = []
    for compaction in (True, False):
        task = Task(TttSection(steps=7, compaction=compaction))
        draft = draft_with(**SHAPES[shape])
        micro = task.micro(make_documents((90, 1, 50), mask, 4))
        output = task.test(draft, micro, LossNorms(torch.tensor(9.0), torch.ones(7)))
        output.loss.backward()
        results.append((output, gradients(draft)))
    (compacted, ours), (dense, theirs) = results
    for ours_S, theirs_S in zip(vars(compacted).values(), vars(dense).values(), strict=True):
        torch.testing.assert_close(ours_S, theirs_S, rtol=1e-5, atol=1e-6)
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


@pytest.mark.parametrize("kind", ["kl", "lk_lambda"])
def test_the_size_of_a_chunk_changes_nothing(kind):
    results = []
    for slots_per_chunk in (1, 5, 1000):
        task = Task(loss=LossSection(kind=kind, normaliser="positions"))
        draft = draft_with()
        micro = task.micro(make_documents((40, 1, 50), "random", 4))
        test = replace(task.test, slots_per_chunk=slots_per_chunk)
        output = test(draft, micro, LossNorms(torch.tensor(9.0), torch.full((3,), 30.0)))
        output.loss.backward()
        results.append((output.loss, gradients(draft)))
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "lk_alpha"])
@pytest.mark.parametrize("shape", ["one layer", "three layers"])
def test_packed_documents_are_trained_as_if_one_at_a_time(shape, kind):
    task = Task(loss=LossSection(kind=kind))
    norms = LossNorms(torch.tensor(7.0), torch.full((3,), 4.0))
    draft = draft_with(**SHAPES[shape])
    documents = make_documents((6, 1, 11, 3), "reply", 4)
    packed = task.test(draft, task.micro(documents), norms)
    packed.loss.backward()
    together = gradients(draft)
    apart = [task.test(draft, task.micro([document]), norms) for document in documents]
    sum(output.loss for output in apart).backward()
    torch.testing.assert_close(sum(output.loss_S for output in apart), packed.loss_S, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(draft).items():
        torch.testing.assert_close(gradient, together[name], rtol=1e-4, atol=1e-6)


def test_nothing_beyond_a_document_s_end_or_before_its_start_influences_it():
    task = Task(TttSection(steps=7))
    draft = draft_with()
    norms = LossNorms(torch.tensor(1.0), torch.ones(7))
    middle = make_documents((13,), "reply", 1)
    silent, other = (make_documents((5, 8), "none", seed) for seed in (2, 3))
    losses = []
    for before, after in (silent, other):
        output = task.test(draft, task.micro([before, *middle, after]), norms)
        output.loss.backward()
        losses.append((output.loss_S.detach(), gradients(draft)))
    (first_S, first), (second_S, second) = losses
    assert first_S.min() > 0
    torch.testing.assert_close(first_S, second_S, rtol=1e-6, atol=0)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["kl", "lk_alpha", "lk_lambda"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_micro_batch_without_loss_gives_zero_gradients_and_no_missing_ones(shape, kind):
    task = Task(loss=LossSection(kind=kind))
    draft = draft_with(**SHAPES[shape])
    output = task.test(draft, task.micro(make_documents((6, 1, 9), "none")), LossNorms(torch.tensor(1.0), torch.zeros(3)))
    output.loss.backward()
    for column in vars(output).values():
        assert torch.equal(column, torch.zeros_like(column))
    for name, gradient in gradients(draft).items():
        assert gradient is not None and not gradient.any(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["kl", "lk_alpha"])
def test_on_a_gpu_a_step_waits_for_the_device_once(kind):
    task = Task(TttSection(steps=7), LossSection(kind=kind), device=torch.device("cuda"))
    plain = draft_with()
    test = task.test
    norms = LossNorms(*(torch.ones(shape, device="cuda") for shape in ((), (7,))))
    draft = Eagle3Draft(plain.config, triton_kernels()).to("cuda")
    micro = task.micro(make_documents((90, 1, 50), "reply", 4))
    test(draft, micro, norms).loss.backward()  # kernels are compiled, constants are made
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            test(draft, micro, norms).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]


@pytest.mark.parametrize("kind", ["kl", "lk_alpha", "lk_lambda"])
def test_the_slots_normaliser_makes_the_gradient_independent_of_the_cut(kind):
    task = Task(loss=LossSection(kind=kind))
    draft = draft_with()
    documents = make_documents((8, 3, 12, 1, 6), "reply", 9)
    results = []
    for cut in ([documents], [documents[:2], documents[2:]], [[d] for d in documents]):
        micros = [task.micro(part) for part in cut]
        losses = [
            task.test(draft, micro, norms).loss for micro, norms in zip(micros, normaliser(task, draft)(micros), strict=True)
        ]
        sum(losses).backward()
        results.append((sum(losses).detach(), gradients(draft)))
    whole_S, whole = results[0]
    for cut_S, cut in results[1:]:
        torch.testing.assert_close(cut_S, whole_S, rtol=1e-5, atol=1e-6)
        for name in whole:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-6)


def normaliser(task: Task, draft: Eagle3Draft) -> Normaliser:
    return Normaliser(task.test, lambda micro, norms: task.test(draft, micro, norms), World.alone())


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_norms_count_slots_of_the_global_batch_or_positions_of_the_micro_batch(alignment):
    ttt = TttSection(steps=3, mask_alignment=alignment)
    parts = [make_documents((8, 3), "reply", 1), make_documents((12, 1), "two replies", 2), make_documents((4,), "none", 3)]
    for name in ("slots", "positions"):
        task = Task(ttt, LossSection(normaliser=name))
        micros = [task.micro(part) for part in parts]
        allowed = [slow_allowed(micro.batch, ttt) for micro in micros]
        slots = [len({t + 1 + i for i, t in rows.nonzero().tolist()}) for rows in allowed]
        rows = torch.stack([loss_rows(a, m.target, task.vocab_map).sum(1) for a, m in zip(allowed, micros, strict=True)])
        norms = normaliser(task, draft_with())(micros)
        if name == "slots":
            assert [norm.slots.item() for norm in norms] == [sum(slots)] * 3
            assert all(torch.equal(norm.loss_rows_S.long(), rows.sum(0)) for norm in norms)
        else:
            assert [norm.slots.item() for norm in norms] == [11, 13, 4]
            assert torch.equal(torch.stack([norm.loss_rows_S for norm in norms]).long(), rows)


def test_a_global_batch_without_any_slot_divides_by_one():
    task = Task()
    (norms,) = normaliser(task, draft_with())([task.micro(make_documents((4, 5), "none"))])
    assert norms.slots.item() == 1


def test_step_weights_decay_or_are_given():
    assert Task(loss=LossSection(step_decay=0.5)).test.step_weights == [1.0, 0.5, 0.25]
    assert Task(loss=LossSection(step_decay=0.0)).test.step_weights == [1.0, 0.0, 0.0]
    assert Task(loss=LossSection(step_weights=(0.0, 2.0, 1.0))).test.step_weights == [0.0, 2.0, 1.0]


def test_attention_knows_the_longest_document_without_asking_the_device():
    seen = []

    def attention(*arguments):
        seen.append(arguments[-1].longest)
        return PLAIN.attention(*arguments)

    test = make_test(steps=3)
    micro = make_micro(test, seed=0, lengths=(17, 23, 5))
    unroll(make_draft(kernels=Kernels(attention)), micro, 3)
    assert seen == [23] * 3
