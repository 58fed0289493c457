"""The interval of a held-out loss, and which evaluation is the best."""

import re

import pytest
import torch

from engine.config.recipe import load_config
from engine.config.sections import ConfigError, EvaluationSection
from engine.evaluation.held_out import HeldOutReport, held_out_report, jackknife_half_width
from engine.evaluation.history import Evaluation, EvaluationHistory


def test_the_jackknife_of_a_mean_is_the_textbook_s_interval():
    sums_BX = torch.tensor([[3.0, 1], [4, 1], [8, 1], [5, 1], [2, 1], [6, 1]], dtype=torch.float64)
    half_width = jackknife_half_width(sums_BX, lambda sums_X: (sums_X[0] / sums_X[1]).item())
    assert half_width == pytest.approx(2.5706 * sums_BX[:, 0].std().item() / 6**0.5, rel=3e-3)
    assert jackknife_half_width(sums_BX[:4], lambda sums_X: 0.0) is None


def test_results_are_those_of_all_batches_together_and_empty_batches_do_not_count():
    one = [8.0, 4, 10, 10, 5, 4, 5, 2]  # loss, allowed, correct and accepted rows of two predictions
    sums_BX = torch.tensor([[*one, 10], [0.0] * 9, [*(2 * value for value in one), 30]], dtype=torch.float64)
    report = held_out_report(sums_BX, [1.0, 0.5], num_documents=7)
    assert report.loss_per_step == pytest.approx([24 / 40, 12 / 40]) and report.loss == pytest.approx(0.6 + 0.15)
    assert report.accuracy_per_step == pytest.approx([0.5, 0.4])
    assert report.acceptance_rate_per_step == pytest.approx([0.5, 0.2])
    assert report.acceptance_length == pytest.approx(1 + 0.5 + 0.5 * 0.2) and report.loss_confidence is None
    silent = torch.tensor([[0.0] * 8 + [5]], dtype=torch.float64)  # positions, of which no row is allowed
    assert held_out_report(torch.cat((sums_BX, silent)), [1.0, 0.5], num_documents=7) == report
    assert held_out_report(silent, [1.0, 0.5], num_documents=7) is None


def held_out(loss: float, length: float) -> HeldOutReport:
    return HeldOutReport(loss, [loss], [0.5], [0.5], length, 0.1, 0.1, 4)


@pytest.mark.parametrize(("best_by", "best"), [("loss", 4), ("simulated_acceptance", 6)])
def test_the_best_is_chosen_by_what_the_recipe_names(best_by, best, tmp_path):
    section = EvaluationSection(best_by=best_by)
    history = EvaluationHistory()
    for step, loss, length in ((2, 3.0, 1.5), (4, 1.0, 1.6), (6, 2.0, 1.8)):
        history.add(Evaluation.of(step, None, held_out(loss, length), section, ""))
    assert history.best.step == best
    history.write(tmp_path)
    again = EvaluationHistory.read(tmp_path, 6, section, pytest.fail)
    assert again.best == history.best and again.first_without_gain(1) == (6 if best == 4 else None)
    by_other = EvaluationSection(best_by="loss" if best == 6 else "simulated_acceptance")
    assert again.add(Evaluation.of(8, None, held_out(9.0, 1.0), by_other, "")), "not comparable with the others"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["evaluation.best_by=loss", "evaluation.num_documents=0"], "num_documents"),
        (["evaluation.num_prompts=0"], "evaluation.best_by = acceptance.*num_prompts"),
        (["target.store=x", "evaluation.num_prompts=0"], "evaluation.best_by = acceptance.*evaluation.store"),
        (["target.store=x", "evaluation.best_by=loss"], "evaluation.store"),
        (["evaluation.store=x"], "evaluation.store = x.*target.store"),
        (["anneal_steps=8", "max_steps=8"], "anneal_steps = 8"),
        (["evaluation.best_by=los"], "loss"),
    ],
)
def test_an_evaluation_that_could_not_choose_is_refused(options, problem):
    with pytest.raises(ConfigError) as refused:
        load_config(None, ["evaluation.every_steps=2", *options])
    assert re.search(problem, str(refused.value))
