"""Bytes that are computed for a draft are those that live when one is trained."""

from dataclasses import replace

import pytest

from engine.config.ds_config import load_ds_config
from engine.models.eagle3.activation_memory import DraftStates
from engine.models.eagle3.flops import StepCounts
from engine.models.training_rows import allowed_rows, slots_of
from engine.planning.draft_memory import Sharing
from tests.distributed import run_ranks
from tests.planning.measured import FOLDER, LOSS, RANKS, TOKENS, TTT, Training, train

CASES = {
    "stage 3": Training(),
    "two layers, few assistant tokens": Training(assistant_share=0.3, num_layers=2),
    "mlp again": Training(stage=2, recompute="mlp"),
    "steps again": Training(stage=1, assistant_share=0.6, recompute="step"),
    "stage 0, fp32": Training(stage=0, bf16=False, assistant_share=0.5, num_layers=2, recompute="mlp"),
}


def counts_of(training: Training) -> StepCounts:
    allowed_ST = allowed_rows(batch := training.documents.batch(TOKENS), TTT)
    return StepCounts.needed(batch, allowed_ST, len(slots_of(allowed_ST)))


def states_of(training: Training, fused: bool = False) -> DraftStates:
    itemsize = training.dtype.itemsize
    return DraftStates(training.draft.shape, counts_of(training), LOSS, itemsize, fused, training.recompute)


@pytest.mark.parametrize("case", CASES)
def test_it_is_within_a_tenth_of_what_lives(case):
    training = CASES[case]
    measured = run_ranks(train, RANKS, CASES[case])[0]
    sharing = Sharing.of(training.ds_config(), RANKS)
    states = states_of(training)
    count = measured["weights of the draft"]
    own = measured["after training"] - measured["weights of the target"]
    assert sharing.weights(count) + sharing.optimizer(count) + sharing.buffers(count) == pytest.approx(own, rel=0.03)
    always = measured["weights of the target"] + sharing.weights(count) + sharing.optimizer(count) + sharing.buffers(count)
    always += (4 * TOKENS + states.counts.num_slots) * 128 * training.dtype.itemsize
    passing = states.kept() + states.on_top() + sharing.gathered(count) + sharing.gradients(count) + sharing.buckets()
    assert always + passing == pytest.approx(measured["draft"], rel=0.1)
    assert always + sharing.gradients(count) + sharing.step(count, fused=False) == pytest.approx(measured["step"], rel=0.15)


def test_an_offloaded_optimizer_takes_nothing_of_the_device():
    sharing = Sharing.of(load_ds_config(FOLDER / "zero3_offload.json"), 4)
    assert sharing.optimizer(10**6) == 0 and sharing.step(10**6, fused=True) == 0
    kept = Sharing.of(load_ds_config(FOLDER / "zero3.json"), 4)
    assert kept.optimizer(10**6) == 12 * 10**6 // 4
    # master weights and moments twice; gradients and weights in the precisions that the file names
    assert kept.step_traffic(10**6) == (2 * 12 + kept.gradient_itemsize + kept.itemsize) * 10**6 // 4


@pytest.mark.parametrize("recompute", ["mlp", "step"])
def test_recomputing_keeps_less_and_kernels_do(recompute):
    plain, fused = (states_of(Training(assistant_share=0.7), fused) for fused in (False, True))
    assert replace(plain, recompute=recompute).kept() < plain.kept()
    assert fused.kept() < plain.kept()
