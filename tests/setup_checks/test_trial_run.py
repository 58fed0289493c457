"""A trial is ready if both losses are finite."""

from engine.setup_checks.trial_run import TrialStep, judge_trial


def test_only_finite_losses_are_ready():
    good = judge_trial([TrialStep(4.0, 2.0), TrialStep(3.5, 0.25)], 2)
    assert good.status == "ok" and "losses 4.000 and 3.500" in good.text and "the second 0.25 s" in good.text
    assert judge_trial([TrialStep(4.0, 2.0), TrialStep(None, 0.25)], 2).status == "problem"
    assert judge_trial([TrialStep(4.0, 2.0)], 2).status == "problem"
