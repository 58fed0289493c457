"""Plans of whole jobs: what they say lives lives, and the largest recipes fit."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from engine.config.ds_config import load_ds_config
from engine.config.recipe import load_config
from engine.config.sections import Config, DataSection, DraftSection, TargetSection
from engine.models.target_families import text_config
from engine.parallel.mesh import ALONE
from engine.parallel.rules import check_proven
from engine.planning.job import Assumed, DocumentSizes, Gpus, JobPlan, Planner, Ranks
from engine.planning.target_cost import TargetCost
from engine.target.structure import without_weights
from engine.weights.quantised_checkpoint import StaysQuantised
from tests.distributed import run_ranks
from tests.planning.measured import LOSS, RANKS, TARGET, TOKENS, Training, train
from tests.recipes_configs import RECIPES, target_config

ROOT = Path(__file__).resolve().parents[2]
ASSUMED = Assumed(DocumentSizes(2048, 0.5), share_of_peak=0.4, headroom=0.1)
# Weights of the language model, in billions, as their publishers give them.
PUBLISHED = {
    "llama3.1-8b": 8.03,
    "llama3.3-70b": 70.6,
    "llama4-scout": 107.8,
    "llama4-maverick": 400.7,
    "qwen3-8b": 8.19,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "deepseek-v3": 671.0,
    "kimi-k2": 1026.4,
}
LARGE = ("llama4-maverick", "qwen3-235b-a22b", "deepseek-v3", "kimi-k2")


def without_numbers(recipe: str) -> PreTrainedModel:
    config = target_config(recipe)
    config.quantization_config = None
    return without_weights(config, TargetSection(), torch.device("cuda"))


def planner(recipe: str, *overrides: str, gpu: str = "NVIDIA H200", may_share: bool = True) -> Planner:
    config = load_config(ROOT / "launcher" / "recipes" / f"{recipe}.yaml", list(overrides))
    gpus = Gpus.named(gpu, memory_gb=None, network_gb_per_s=50, per_node=8)
    quantised = StaysQuantised.of(target_config(recipe), config.target.keep_quantised)
    ds_config = load_ds_config(ROOT / "ds_configs" / "zero3.json")
    return Planner(config, ds_config, without_numbers(recipe), gpus, ASSUMED, quantised, may_share)


@cache
def shared_planner(recipe: str) -> Planner:
    """For tests that only read it: to make one takes seconds for the largest targets."""
    return planner(recipe)


@cache
def smallest(recipe: str, num_gpus: int) -> list[JobPlan]:
    return shared_planner(recipe).smallest(num_gpus)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_run_holds_what_its_plan_says(tp_size):
    training = Training(tp_size=tp_size)
    measured = run_ranks(train, RANKS, training)[0]
    config = Config(
        target=TargetSection(dtype="bfloat16"),
        draft=DraftSection(vocab_size=2048),
        data=DataSection(max_tokens=TOKENS),
        loss=LOSS,
    )
    model = without_weights(TARGET, config.target, torch.device("cpu"))
    ranks = Ranks(RANKS, tp_size, 1, 1)
    plan = JobPlan(config, training.ds_config(), training.draft, TargetCost(model, ranks.mesh), ranks, fused=False)
    by_part = plan.bytes_by_part(plan.counts(training.documents))
    assert sum(by_part.values()) == pytest.approx(max(measured[phase] for phase in ("target", "draft", "step")), rel=0.1)
    assert by_part["target"] == measured["weights of the target"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_targets_have_as_many_weights_as_published(recipe):
    billions = TargetCost(shared_planner(recipe).model, ALONE).num_weights / 1e9
    assert billions == pytest.approx(PUBLISHED[recipe], rel=2e-3)


@pytest.mark.parametrize("recipe", LARGE)
def test_the_largest_targets_fit_8_to_32_gpus(recipe):
    plans = shared_planner(recipe)
    best = smallest(recipe, 32)[0]
    assert 8 <= best.ranks.size <= 32 and best.num_tokens >= 4096
    assert plans.bytes_of(best) < 141e9
    facts = plans.facts(best)
    row = "| {} | {} | {} | {} | {:,} | {:.0f} | {:.0f} |".format(
        recipe,
        *(facts[name] for name in ("gpus", "tp_size", "ep_size", "tokens")),
        facts["bytes"]["target"] / 1e9,
        plans.bytes_of(best) / 1e9,
    )
    assert row in (ROOT / "docs" / "targets.md").read_text(encoding="utf-8"), row


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_as_it_is(recipe):
    plans = shared_planner(recipe)
    own = plans.config.parallel
    assert plans.fits(plans.plan(Ranks.of(plans.config, plans.ds_config, max(own.tp_size, own.ep_size))))
    if recipe in LARGE:
        assert smallest(recipe, 32)[0].ranks.mesh == Ranks.of(plans.config, plans.ds_config, 8).mesh


def test_fewer_gpus_than_needed_are_refused_with_what_is_missing():
    assert smallest("deepseek-v3", 4) == []
    reason = shared_planner("deepseek-v3").why_nothing_fits(4)
    assert "needs" in reason and "--gpus" in reason


def test_a_family_that_was_not_proven_is_not_shared():
    assert {plan.ranks.mesh.size for plan in planner("llama3.1-8b", may_share=False).smallest(8)} == {1}
    assert planner("llama3.3-70b", may_share=False).smallest(8) == []


def test_the_best_micro_batch_is_the_largest_that_fits():
    plans = planner("llama3.1-8b")
    best = plans.smallest(8)[0]
    more = plans.plan(replace(best.ranks, micro_batch=2 * best.ranks.micro_batch))
    assert plans.fits(best) and (not plans.fits(more) or more.num_tokens > 32768)


def test_what_is_asked_for_costs_what_it_should():
    plain, ahead = (
        planner("llama3.1-8b", "overlap.placement=colocated", f"overlap.look_ahead={depth}").plan(Ranks(8, 1, 1, 1))
        for depth in (0, 1)
    )
    counts = plain.counts(ASSUMED.documents)
    assert sum(ahead.bytes_by_part(counts).values()) > sum(plain.bytes_by_part(counts).values())
    assert plain.traffic(counts).keys() == {"all-gather of weights (ZeRO)", "reduce-scatter of gradients (ZeRO)"}
    weights = plain.num_draft_weights * 2
    assert plain.traffic(counts)["all-gather of weights (ZeRO)"] == weights * 7 // 8
    quick, slow = (
        plain.side_times(counts, planner("llama3.1-8b", gpu=gpu).gpus, ASSUMED)
        for gpu in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB")
    )
    assert slow.target_compute_s == pytest.approx(quick.target_compute_s * 989.4 / 312)


def test_an_unknown_gpu_is_refused_by_name():
    with pytest.raises(ValueError, match="NVIDIA H200"):
        Gpus.named("GeForce", None, 50, 8)


def test_proofs_cover_the_largest_targets():
    for recipe in LARGE:
        check_proven(text_config(target_config(recipe)))
