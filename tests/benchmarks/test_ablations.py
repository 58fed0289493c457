"""Statistics of paired acceptance lengths, and resuming of interrupted ablations."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import ablations
from benchmarks.ablation_trials import Budget, FailedCommandError, Trial
from benchmarks.ablations import DEFAULT, VARIANTS, Results, command_line, compare, make_trials, run_trials
from benchmarks.paired_lengths import estimate, influence, lengths, students_quantile
from engine.config.ds_config import load_ds_config
from engine.config.recipe import load_config
from engine.host.files import write_json

BUDGET = Budget(max_steps=10, num_prompts=4, max_new_tokens=8)
NAMES = [DEFAULT, "ttt 1", "muon"]


class FakeTrainer:
    """Stands for the command: counts its calls, and fails or is killed where it is told to."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []
        self.fails = ""
        self.killed_after = 100

    def __call__(self, trial: Trial) -> Path:
        if len(self.trained) == self.killed_after:
            raise KeyboardInterrupt
        self.trained.append((trial.name, trial.seed))
        if trial.name == self.fails:
            raise FailedCommandError("out of memory")
        return Path(f"{trial.name}/{trial.seed}")


def fake_measure(draft: Path) -> tuple[list[int], list[int]]:
    """Stands for decoding: with one TTT step, every prompt takes some forwards more."""
    seed = int(draft.name)
    more = 4 if draft.parent.name == "ttt 1" else 0
    forwards = [20 + more + (prompt + seed) % 2 for prompt in range(4)]
    return [40, 44, 48, 40], forwards


def run(results: Results, trainer: FakeTrainer, budget: Budget = BUDGET) -> dict[str, str]:
    return run_trials(make_trials(NAMES, [0, 1], budget), results, trainer, fake_measure, say=lambda text: None)


def test_a_killed_run_continues_and_repeats_nothing(tmp_path):
    path = tmp_path / "results.jsonl"
    trainer = FakeTrainer()
    trainer.killed_after = 4
    with pytest.raises(KeyboardInterrupt):
        run(Results(path), trainer)
    with path.open("a") as file:
        file.write('{"key": "cut o')
    trainer.killed_after = 100
    run(Results(path), trainer)
    assert sorted(trainer.trained) == sorted((name, seed) for name in NAMES for seed in (0, 1))
    run(Results(path), trainer)
    assert len(trainer.trained) == 6, "all are finished"


def test_another_budget_or_option_is_another_entry(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    trainer = FakeTrainer()
    run(Results(path), trainer)
    longer = replace(BUDGET, max_steps=20)
    run(Results(path), trainer, longer)
    assert len(trainer.trained) == 12
    monkeypatch.setitem(ablations.VARIANTS, "muon", replace(VARIANTS["muon"], options=("ttt.steps=2",)))
    run(Results(path), trainer)
    assert trainer.trained[12:] == [("muon", 0), ("muon", 1)]
    assert len(compare(NAMES, [0, 1], longer, Results(path))) == 2, "the changed variant has no entry of the longer budget"


def test_a_failed_variant_is_reported_tried_again_and_stops_no_other(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    trainer = FakeTrainer()
    trainer.fails = "ttt 1"
    assert run(results, trainer) == {"ttt 1": "out of memory"}
    assert [row["variant"] for row in compare(NAMES, [0, 1], BUDGET, results)] == [DEFAULT, "muon"]
    trainer.fails = ""
    assert run(results, trainer) == {}
    by_name = {row["variant"]: row for row in compare(NAMES, [0, 1], BUDGET, results)}
    assert by_name["ttt 1"]["verdict"] == "worse"
    assert by_name["muon"]["difference"] == 0 and by_name["muon"]["verdict"] == "none shown"


def test_every_variant_is_a_valid_configuration_of_its_own(tmp_path):
    jobs = []
    for variant in VARIANTS.values():
        ds_config = tmp_path / variant.ds_config
        write_json(ds_config, variant.deepspeed())
        recipe = load_config(ablations.DEFAULT_RECIPE, variant.options)
        jobs.append((recipe, load_ds_config(ds_config), variant.store))
    assert all(job not in jobs[:number] for number, job in enumerate(jobs))


def test_the_recorded_command_names_what_was_compared():
    assert command_line(list(VARIANTS), [0, 1], BUDGET).endswith("ablations --seeds 0 1 --max_steps 10 --max_new_tokens 8")
    assert "--variants default 'ttt 1' muon --seeds 3" in command_line(NAMES, [3], BUDGET)


def test_students_quantile_equals_published_values():
    published = {1: 12.7062, 2: 4.3027, 4: 2.7764, 30: 2.0423, 1000: 1.9623}
    for degrees, value in published.items():
        assert students_quantile(degrees) == pytest.approx(value, rel=2e-3)
    assert students_quantile(2) > students_quantile(2.5) > students_quantile(3)


def test_influence_averages_to_the_ratio_of_sums():
    tokens_SP = torch.tensor([[40, 10, 30], [40, 12, 30]])
    forwards_SP = torch.tensor([[20, 9, 11], [16, 9, 10]])
    torch.testing.assert_close(influence(tokens_SP, forwards_SP).mean(1), lengths(tokens_SP, forwards_SP))
    assert lengths(tokens_SP, forwards_SP)[0] == 2.0


@pytest.mark.parametrize(("seed_spread", "prompt_spread"), [(0.0, 1.0), (0.3, 0.0), (0.2, 1.0)])
def test_intervals_cover_the_true_mean_as_often_as_they_say(seed_spread, prompt_spread):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    num_trials = 300
    covered = 0
    for _ in range(num_trials):
        values_SP = 2.0 + seed_spread * normal(3, 1) + prompt_spread * normal(1, 40) + 0.5 * normal(3, 40)
        low, high = estimate(values_SP).interval
        covered += low <= 2.0 <= high
    # 95% is 285; four standard deviations of a binomial count are 15. The interval may be wider, since a variance is floored.
    assert covered >= 270


def test_an_error_needs_two_seeds():
    with pytest.raises(ValueError, match="1 seeds and 5 prompts"):
        estimate(torch.zeros(1, 5, dtype=torch.float64))
