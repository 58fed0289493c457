"""Losses and gradients of block drafters are those of the public trainers, on every path."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.batch import MicroBatch, PackedBatch, TargetOutput
from engine.config.strict import ConfigError
from engine.evaluation.held_out import batch_sums, held_out_report
from engine.kernels import PLAIN, Kernels, TokenLoss, choose_kernels, fused
from engine.kernels.token_loss import token_loss
from engine.models.method_registry import make_method
from tests.block_drafts import gradients, make_batch, make_method_of, make_recipe, make_tables, norms_of
from tests.block_drafts import make_draft as make_draft_of
from tests.block_drafts import make_micro as make_micro_of
from tests.block_drafts import make_objective as make_objective_of
from tests.models.block_drafter.golden_cases import Case, learn, make_draft, make_objective, read_cases

# Relative errors of the loss, and of all gradients together.
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-6, 1e-5)}
CASES = [case for dtype in TOLERANCE for case in read_cases(dtype)]


def name(case: Case) -> str:
    return f"{case.name} {case.variant} {str(case.dtype).removeprefix('torch.')}"


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


def kernels_of(path: str) -> Kernels:
    if path == "reference":
        return choose_kernels("reference", torch.device("cpu"), torch.float32, 8)
    if path == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        # Its norms are liger-kernel's, which Triton's interpreter cannot run.
        return replace(fused(PLAIN), elementwise=PLAIN.elementwise)
    return PLAIN


# Triton has no float64, and its interpreter is slow.
PATHS = [(case, compaction, "tiles") for case in CASES for compaction in (True, False)]
PATHS += [(case, True, "reference") for case in CASES]
PATHS += [(case, True, "triton") for case in CASES if case.dtype == torch.float32]


@pytest.mark.parametrize(
    ("case", "compaction", "path"),
    PATHS,
    ids=[f"{name(case)} {path}{'' if compaction else ' all rows'}" for case, compaction, path in PATHS],
)
def test_losses_and_gradients_match(case, compaction, path):
    draft = make_draft(case, kernels_of(path))
    objective = make_objective(case, compaction)
    plan, learned = learn(case, draft, objective)
    of_loss, of_gradients = TOLERANCE[case.dtype]
    block_R = plan.block_P[plan.loss_row_R]
    anchors = case.tensors["in.anchors"].tolist()
    place_N = torch.tensor([anchors.index(anchor) for anchor in plan.anchor_N.tolist()])
    expected_RD = case.tensors["out.hidden"][place_N[block_R], plan.offset_P[plan.loss_row_R]]
    assert relative(learned.hidden_RD, expected_RD) <= of_gradients
    assert relative(learned.total, case.out("loss")) <= of_loss
    learned.total.backward()
    expected = case.gradients
    trained = dict(draft.named_parameters())
    assert trained.keys() <= expected.keys() | {"embed_tokens.weight", "lm_head.weight"}
    for parameter, gradient in expected.items():
        if parameter in trained:
            found = trained[parameter].grad
            found = torch.zeros_like(gradient) if found is None else found
            assert (found - gradient).norm() <= of_gradients * max(gradient.norm(), 1e-3), parameter


def split(batch):
    bounds = batch.cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        cu_seqlens = torch.tensor([0, end - start], dtype=torch.int32)
        yield slice(start, end), PackedBatch(batch.input_ids_T[start:end], batch.assistant_mask_T[start:end], cu_seqlens)


def part_of(micro: MicroBatch, tokens: slice, batch: PackedBatch) -> MicroBatch:
    """The micro-batch of one document, cut out of one of several documents."""
    target = micro.target
    own_N = (target.slots_N >= tokens.start) & (target.slots_N < tokens.stop)
    stats = (stat_N if stat_N is None else stat_N[own_N] for stat_N in (target.argmax_N, target.lse_N))
    own = TargetOutput(target.aux_TA[tokens], target.slots_N[own_N] - tokens.start, target.last_hidden_ND[own_N], *stats)
    return MicroBatch(batch, own, micro.embed_TD[tokens], micro.allowed_ST[:, tokens])


VARIANTS = {
    "dflash": ("dflash", {}, {}),
    "dflash causal windows": ("dflash", {}, {"causal": True, "windows": (4, 0), "attention_bias": True}),
    "dflash dpace": ("dflash", {"weights": "dpace"}, {}),
    "dflash kl": ("dflash", {"kl": 0.5, "l1": 0.25}, {"windows": (6, 6)}),
    "dflash argmax": ("dflash", {"label": "argmax"}, {}),
    "dspark": ("dspark", {}, {}),
    "dspark argmax": ("dspark", {"label": "argmax"}, {}),
    "dspark gated": ("dspark", {}, {"markov_head": "gated", "causal": True}),
    "dspark rnn": ("dspark", {}, {"markov_head": "rnn"}),
    "dspark hard": ("dspark", {"l1": 0.0, "confidence": 0.0}, {}),
    "dspark without confidence": ("dspark", {"l1": 0.0}, {"confidence_head": False}),
    "dflash2": ("dflash2", {}, {"windows": (6, 0)}),
    "dflash2 dpace": ("dflash2", {"weights": "dpace"}, {}),
    "dflash2 without the selector": ("dflash2", {"selector": 0.0}, {}),
    "dflash2 injected": ("dflash2", {"selector_inject": True}, {"conv_taps": 3}),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    name, objective, block = VARIANTS[request.param]
    return make_method_of(name, objective=objective, **block)


def close(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (found[parameter] - gradient).norm() <= tolerance * max(gradient.norm().item(), 1e-3), parameter


def test_labels_that_the_loss_finds_are_the_target_s_most_likely_tokens():
    method = make_method_of("dspark", objective={"label": "argmax"})
    draft = make_draft_of(method)
    objective = make_objective_of(method)
    micro = make_micro_of(method, make_batch())
    target = micro.target
    assert target.argmax_N is None
    head = make_tables().head
    told = replace(micro, target=replace(target, argmax_N=head.argmax_and_lse(target.last_hidden_ND)[0]))
    found, expected = (objective(draft, each, norms_of(objective, [micro])) for each in (micro, told))
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.num_correct_S, expected.num_correct_S)


def test_a_packed_batch_teaches_what_its_documents_teach_alone(variant):
    draft = make_draft_of(variant)
    objective = make_objective_of(variant)
    micro = make_micro_of(variant, make_batch((17, 23, 9)))
    norms = norms_of(objective, [micro])
    together = objective(draft, micro, norms)
    parts = [objective(draft, part_of(micro, *own), norms) for own in split(micro.batch)]
    expected = gradients(draft, together.loss)
    close(gradients(draft, sum(part.loss for part in parts)), expected)
    for name in ("num_loss_rows_S", "num_correct_S", "accepted_S", "loss_S"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(together, name))
    assert any(gradient.norm() > 0 for gradient in expected.values())


def test_compaction_keeps_loss_and_every_gradient(variant):
    draft = make_draft_of(variant)
    micro = make_micro_of(variant, make_batch((17, 23, 9)))
    results = []
    for compaction in (True, False):
        objective = replace(make_objective_of(variant), compaction=compaction)
        results.append(objective(draft, micro, norms_of(objective, [micro])))
    torch.testing.assert_close(results[0].loss, results[1].loss)
    close(gradients(draft, results[0].loss), gradients(draft, results[1].loss))


def test_chunks_of_the_loss_and_recomputation_change_nothing(variant):
    plain = make_draft_of(variant)
    micro = make_micro_of(variant, make_batch((17, 23, 9)))
    objective = make_objective_of(variant)
    norms = norms_of(objective, [micro])
    expected = gradients(plain, objective(plain, micro, norms).loss)
    few_rows = partial(token_loss_in_chunks, 7 * 96 * 4)
    for kernels in (replace(PLAIN, token_loss=few_rows), replace(PLAIN, recompute="mlp"), replace(PLAIN, recompute="layer")):
        draft = make_draft_of(variant, kernels)
        close(gradients(draft, objective(draft, micro, norms).loss), expected)


def token_loss_in_chunks(chunk_bytes: int, *arguments) -> TokenLoss:
    return token_loss(*arguments[:-1], replace(arguments[-1], chunk_bytes=chunk_bytes))


def test_the_reference_kernels_give_the_same(variant):
    micro = make_micro_of(variant, make_batch((17, 23, 9)))
    objective = make_objective_of(variant)
    norms = norms_of(objective, [micro])
    kernels = choose_kernels("reference", torch.device("cpu"), torch.float32, 8)
    results = []
    for draft in (make_draft_of(variant), make_draft_of(variant, kernels)):
        output = objective(draft, micro, norms)
        results.append((output, gradients(draft, output.loss)))
    (output, grads), (expected, expected_grads) = results
    close(grads, expected_grads)
    for name in ("loss", "loss_S", "num_correct_S", "accepted_S"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name))


def test_a_batch_without_loss_has_no_gradient_and_no_nan(variant):
    draft = make_draft_of(variant)
    batch = make_batch((17, 23))
    micro = make_micro_of(variant, replace(batch, assistant_mask_T=torch.zeros(40, dtype=torch.bool)))
    objective = make_objective_of(variant)
    output = objective(draft, micro, norms_of(objective, [micro]))
    assert output.loss == 0
    assert all(not gradient.any() for gradient in gradients(draft, output.loss).values())


def test_every_loss_of_a_step_counts_by_its_weight_in_the_global_batch():
    method = make_method_of("dflash")
    objective = make_objective_of(method)
    micro = make_micro_of(method, make_batch((17, 23)))
    decay = torch.exp(-torch.arange(4) / 4.0)
    torch.testing.assert_close(objective.loss_share(micro), (objective.count_loss_rows(micro) * decay).sum())


def test_the_loss_of_all_predictions_is_the_trained_loss(variant):
    draft = make_draft_of(variant)
    objective = make_objective_of(variant)
    micro = make_micro_of(variant, make_batch((17, 23, 9)))
    output = objective(draft, micro, norms_of(objective, [micro]))
    weights_S = torch.tensor(objective.step_weights)
    torch.testing.assert_close((output.loss_S * weights_S).sum(), output.loss.detach())


def test_a_held_out_loss_is_the_loss_of_all_documents_as_one_batch(variant):
    draft = make_draft_of(variant)
    objective = make_objective_of(variant)
    whole = make_micro_of(variant, make_batch((17, 23, 9)))
    expected = objective(draft, whole, norms_of(objective, [whole])).loss.item()
    sums = []
    for tokens, batch in split(whole.batch):
        part = part_of(whole, tokens, batch)
        norms = norms_of(objective, [part])
        sums.append(batch_sums(objective(draft, part, norms), norms.slots, objective.loss_share(part)))
    report = held_out_report(torch.stack(sums), objective.step_weights, 3)
    assert report.loss == pytest.approx(expected, rel=1e-5)


def test_hard_labels_ask_for_no_target_states():
    batch = make_batch((17, 23))
    for name, objective, needs in (("dflash", {}, False), ("dflash", {"kl": 1.0}, True), ("dspark", {}, True)):
        method = make_method_of(name, objective=objective)
        assert (len(method.slots(method.allowed_rows(batch))) > 0) == needs
        assert (len(method.stored_slots(batch)) > 0) == needs


def test_parity_has_the_other_trainers_anchors():
    batch = make_batch((9, 40))
    automodel = make_method_of("dflash", objective={"parity": "automodel"}).allowed_rows(batch).any(0)
    # The block of an anchor, five rows, lies in its document.
    assert automodel.nonzero().flatten().max() == 49 - 5 - 1
    assert automodel[:9].nonzero().flatten().max() == 9 - 5 - 1
    speculators = make_method_of("dflash", objective={"parity": "speculators"}).allowed_rows(batch).any(0)
    assert speculators.nonzero().flatten().max() == 49 - 5 - 2
    before = make_method_of("dspark", objective={"parity": "speculators"}).allowed_rows(batch)
    gap = 9 + 20
    assert before[2, gap - 3 - 1]  # anchor gap - 3; the label after the mask's gap is learned
    assert not before[3, gap - 3 - 1]


@pytest.mark.parametrize(
    ("name", "objective", "block", "key"),
    [
        ("dspark", {"parity": "speculators"}, {"markov_head": "rnn"}, "objective.parity"),
        ("dflash2", {"selector_normaliser": "covered"}, {}, "objective.selector_normaliser"),
        ("dflash", {}, {"markov_head": "rnn"}, "block.markov_head"),
        ("dflash", {"selector": 0.5}, {}, "objective.selector"),
        ("dspark", {}, {"conv_taps": 3}, "block.conv_taps"),
        ("dflash", {"dpace_alpha": 0.3}, {}, "objective.dpace_alpha"),
        ("dflash", {"weights": "dpace", "decay": 3.0}, {}, "objective.decay"),
        ("dspark", {"weights": "dpace", "decay": 3.0}, {}, "objective.decay"),
        ("dflash", {"parity": "automodel", "weights": "dpace"}, {}, "objective.weights"),
        ("dspark", {"parity": "specforge", "weights": "dpace"}, {}, "objective.weights"),
        ("dspark", {"parity": "speculators", "weights": "dpace", "l1": 0.45}, {}, "objective.weights"),
        ("dflash2", {"parity": "specforge", "selector_normaliser": "covered"}, {}, "objective.selector_normaliser"),
    ],
)
def test_options_that_would_have_no_effect_or_a_wrong_one_are_refused(name, objective, block, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        make_method(make_recipe(name, objective=objective, **block))
