"""Each loss is found by its name, and a score's derivative is the one that autograd finds."""

import pytest
import torch

from engine.batch import LossNorms
from engine.config.sections import LOSS_KINDS, LossSection
from engine.models.losses.jensen_shannon import jensen_shannon
from engine.models.losses.loss_registry import SHIPPED, make_loss, register_loss
from engine.models.losses.total_variation import TotalVariationLoss, total_variation

NORMS = LossNorms(torch.tensor(4.0), torch.tensor([2.0, 0.0, 5.0]))


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_every_kind_of_a_recipe_has_a_loss_whose_weights_are_finite(kind):
    weights = make_loss(LossSection(kind=kind)).weights(NORMS, torch.tensor([0.1, 0.5, 0.9]))
    weight_xS = weights.stacked()
    assert weight_xS.shape == (3 if weights.score is None else 4, 3)
    assert weight_xS.isfinite().all()
    assert (weight_xS.sum(0) > 0).all()
    assert (weights.score is None) == (weights.score_S is None)


def test_recipes_and_the_registry_know_the_same_losses():
    assert tuple(SHIPPED) == LOSS_KINDS


def test_a_registered_loss_is_found_and_a_misspelt_one_is_named():
    register_loss("tv_of_a_test", TotalVariationLoss)
    assert isinstance(make_loss(LossSection(kind="tv_of_a_test")), TotalVariationLoss)
    with pytest.raises(ValueError, match="loss.kind = lk_lamda: .*did you mean 'lk_lambda'"):
        make_loss(LossSection(kind="lk_lamda"))


@pytest.mark.parametrize("score", [total_variation, jensen_shannon])
def test_the_derivative_is_the_one_that_autograd_finds(score):
    g = torch.Generator().manual_seed(0)
    p_kU = torch.randn(5, 11, generator=g, dtype=torch.float64).softmax(-1)
    log_q_kU = torch.randn(5, 11, generator=g, dtype=torch.float64).log_softmax(-1).requires_grad_()
    loss_k, slope_kU = score(p_kU, log_q_kU)
    (by_log_q_kU,) = torch.autograd.grad(loss_k.sum(), log_q_kU)
    expected_kU = by_log_q_kU / log_q_kU.exp()
    # A constant in the derivative by q drops out, since the probabilities of a row sum to one.
    difference_kU = (slope_kU - expected_kU).detach()
    torch.testing.assert_close(difference_kU, difference_kU[:, :1].expand_as(difference_kU), rtol=0, atol=1e-12)
