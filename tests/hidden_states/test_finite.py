"""A document with a state that is not finite is left out as if it had not been there."""

from dataclasses import replace

import pytest
import torch

from engine.batch import DraftOutput, MicroBatch
from engine.config.sections import LossSection
from engine.hidden_states.finite import find_faults, place_names, without_faulty_documents
from engine.models.normaliser import Normaliser
from tests.models.test_normaliser import ALONE, LocalDraft
from tests.tasks import HIDDEN, Task, make_documents

NAN = float("nan")
INF = float("inf")
POISONED = 1  # the document in the middle
LENGTHS = (11, 17, 9)
PLACES = ("embedding", "aux 1", "aux 2", "aux 3", "last hidden", "lse")


def poisoned_micro(task: Task, place: str, value: float, dtype: torch.dtype = torch.float32) -> MicroBatch:
    """Three documents, of which the one in the middle has one bad value."""
    micro = task.micro(make_documents(LENGTHS, "reply"))
    target = micro.target
    token = LENGTHS[0] + 8
    slot = int((target.slots_N >= token).nonzero()[0])
    aux_TA, embed_TD, last_hidden_ND, lse_N = (
        x.clone() for x in (target.aux_TA.to(dtype), micro.embed_TD.to(dtype), target.last_hidden_ND, target.lse_N)
    )
    if place == "embedding":
        embed_TD[token, 3] = value
    elif place == "last hidden":
        last_hidden_ND[slot, 3] = value
    elif place == "lse":
        lse_N[slot] = value
    else:
        aux_TA[token, HIDDEN * int(place[-1]) - 1] = value
    target = replace(target, aux_TA=aux_TA, last_hidden_ND=last_hidden_ND, lse_N=lse_N)
    return replace(micro, target=target, embed_TD=embed_TD)


def learn(task: Task, micro: MicroBatch) -> tuple[DraftOutput, dict[str, torch.Tensor]]:
    """What an optimizer step over one micro-batch computes, and its gradients."""
    draft = LocalDraft(task.test)
    (norms,) = Normaliser(draft.test, draft.forward, ALONE)([micro])
    output = draft.forward(micro, norms)
    output.loss.backward()
    return output, {name: weight.grad for name, weight in draft._draft.named_parameters()}


@pytest.mark.parametrize(("place", "value"), zip(PLACES, (NAN, NAN, INF, -INF, INF, NAN), strict=True))
@pytest.mark.parametrize("normaliser", ["slots", "positions"])
@pytest.mark.parametrize("kind", ["kl", "lk_lambda"])
def test_what_is_learned_is_what_the_other_documents_teach(kind, normaliser, place, value):
    task = Task(loss=LossSection(kind=kind, normaliser=normaliser))
    others = [document for index, document in enumerate(make_documents(LENGTHS, "reply")) if index != POISONED]
    expected, expected_gradients = learn(task, task.micro(others))
    left_out = without_faulty_documents(poisoned_micro(task, place, value))
    output, gradients = learn(task, left_out)
    for name in ("num_loss_rows_S", "num_allowed_rows_S", "num_correct_S"):
        assert torch.equal(getattr(output, name), getattr(expected, name)), name
    # the rows are the same, products over more of them may round otherwise
    torch.testing.assert_close(output.loss_S, expected.loss_S, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.accepted_S, expected.accepted_S, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    assert int(left_out.num_tokens) == sum(LENGTHS) - LENGTHS[POISONED]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_document_and_its_first_bad_place_are_found(place, dtype):
    micro = poisoned_micro(Task(), place, NAN, dtype)
    faults = find_faults(micro.batch, micro.target, micro.embed_TD)
    column = min(PLACES.index(place), len(place_names((0, 1, 3))) - 1)
    assert faults.by_place.nonzero().tolist() == [[POISONED, column]]
    assert faults.left_out_T.nonzero().flatten().tolist() == list(range(LENGTHS[0], LENGTHS[0] + LENGTHS[POISONED]))


def test_large_finite_states_are_kept():
    micro = poisoned_micro(Task(), "aux 2", torch.finfo(torch.float32).max)
    assert not find_faults(micro.batch, micro.target, micro.embed_TD).by_place.any()


def test_a_batch_without_faults_is_not_changed():
    micro = Task().micro(make_documents(LENGTHS, "reply"))
    kept = without_faulty_documents(micro)
    assert torch.equal(kept.allowed_ST, micro.allowed_ST) and torch.equal(kept.embed_TD, micro.embed_TD)
    for name in ("aux_TA", "slots_N", "last_hidden_ND", "argmax_N", "lse_N"):
        assert torch.equal(getattr(kept.target, name), getattr(micro.target, name)), name
    draft = LocalDraft(Task().test)
    normalise = Normaliser(draft.test, draft.forward, ALONE)
    (norms,) = normalise([micro])
    (kept_norms,) = normalise([kept])
    assert torch.equal(norms.slots, kept_norms.slots) and torch.equal(norms.loss_rows_S, kept_norms.loss_rows_S)


@pytest.mark.parametrize("normaliser", ["slots", "positions"])
def test_a_batch_of_nothing_else_teaches_nothing(normaliser):
    task = Task(loss=LossSection(normaliser=normaliser))
    micro = task.micro(make_documents((17,), "reply"))
    micro.target.aux_TA[5] = NAN
    output, gradients = learn(task, without_faulty_documents(micro))
    assert output.loss.item() == 0 and not output.num_allowed_rows_S.any()
    assert all((gradient == 0).all() for gradient in gradients.values())
