"""FLOPs of a micro-batch against a count by hand, and what becomes of them on devices with and without a datasheet."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from engine.batch import PackedBatch
from engine.config.recipe import load_config
from engine.config.sections import TargetSection
from engine.hidden_states.micro_batches import MicroBatchMaker
from engine.models.costs import PEAKS
from engine.models.method_registry import make_method
from engine.parallel.mesh import ALONE, World
from engine.planning.target_cost import TargetCost
from engine.runtime import training_schedule
from engine.runtime.model_flops import CountedTarget, PeakSeconds, TargetRates
from engine.runtime.training_schedule import Training
from engine.target.frozen import FrozenTarget
from engine.target.structure import without_weights

CPU = torch.device("cpu")
# D, F, H, G, E, V, U, layers of the target
WIDTH, INNER, HEADS, GROUPS, HEAD_DIM, VOCAB, DRAFT_VOCAB, LAYERS = 32, 48, 4, 2, 8, 96, 64, 5
LLAMA = LlamaConfig(
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_attention_heads=HEADS,
    num_key_value_heads=GROUPS,
    head_dim=HEAD_DIM,
    vocab_size=VOCAB,
    num_hidden_layers=LAYERS,
    tie_word_embeddings=False,
)
QUERIES = HEADS * HEAD_DIM
KEYS_VALUES = 2 * GROUPS * HEAD_DIM
TOKENS = 6
BATCH = PackedBatch(torch.arange(TOKENS), torch.ones(TOKENS, dtype=torch.bool), torch.tensor([0, TOKENS], dtype=torch.int32))
ROWS = 4  # one step, and a row needs two tokens after its own
PAIRS = 1 + 2 + 3 + 4  # each of these rows sees itself and what is before it

# Forward 2, gradients of inputs and of weights 2 each; frozen inputs need no gradient.
DRAFT_FLOPS = (
    4 * TOKENS * 3 * WIDTH * WIDTH
    + 6 * (ROWS * WIDTH * QUERIES + TOKENS * WIDTH * KEYS_VALUES)
    + 4 * (ROWS * WIDTH * QUERIES + TOKENS * WIDTH * KEYS_VALUES)
    + 12 * PAIRS * QUERIES
    + 6 * ROWS * QUERIES * WIDTH
    + 6 * ROWS * 3 * WIDTH * INNER
    + 6 * ROWS * WIDTH * DRAFT_VOCAB
    + 2 * ROWS * WIDTH * DRAFT_VOCAB  # the target's distribution over the draft's vocabulary
)
TARGET_FLOPS = (
    2 * TOKENS * LAYERS * (WIDTH * (2 * QUERIES + KEYS_VALUES) + 3 * WIDTH * INNER)
    + 4 * sum(range(1, TOKENS + 1)) * QUERIES * LAYERS
    + 2 * ROWS * WIDTH * VOCAB
)


@pytest.fixture
def training() -> Training:
    config = load_config(None, [f"draft.vocab_size={DRAFT_VOCAB}", "ttt.steps=1", "target.aux_layers=[0,1,3]"])
    method = make_method(config)
    draft = replace(method.derive_config(LLAMA, (0, 1, 3)), intermediate_size=INNER)
    return Training(config, {}, World.alone(), method, draft, torch.bfloat16, 1)


def test_seconds_at_the_peak_are_those_of_a_count_by_hand(training):
    allowed_ST = training.method.allowed_rows(BATCH)
    assert allowed_ST.sum() == ROWS
    draft_alone = PeakSeconds(training.method, training.draft, 100.0, print)
    assert draft_alone(BATCH, allowed_ST) * 100 == pytest.approx(DRAFT_FLOPS)
    rates = TargetRates.of(TargetCost(without_weights(LLAMA, TargetSection(), CPU), ALONE), 3)
    both = PeakSeconds(training.method, training.draft, 100.0, print, rates, 50.0)
    assert both(BATCH, allowed_ST) == pytest.approx(DRAFT_FLOPS / 100 + TARGET_FLOPS / 50)


def test_the_target_counts_where_it_runs_and_devices_without_a_datasheet_do_not(training, monkeypatch):
    notes: list[str] = []
    running = FrozenTarget.__new__(FrozenTarget)
    running.dtype = torch.float32
    elsewhere = SimpleNamespace()
    assert training_schedule._peak_seconds(training, running, notes.append) is None, "a CPU"
    h200 = PEAKS["NVIDIA H200"]
    monkeypatch.setattr(training_schedule, "peak_of", lambda device: h200)
    monkeypatch.setattr("engine.runtime.model_flops.load_target_config", lambda section: LLAMA)
    training = replace(training, count_target=partial(CountedTarget.read, training.config, CPU, 3))
    allowed_ST = training.method.allowed_rows(BATCH)
    counted = [training_schedule._peak_seconds(training, target, notes.append) for target in (running, elsewhere)]
    seconds = [count(BATCH, allowed_ST) for count in counted]
    draft_s = DRAFT_FLOPS / h200.flops_per_s[torch.bfloat16]
    assert seconds[1] == pytest.approx(draft_s)
    assert seconds[0] == pytest.approx(draft_s + TARGET_FLOPS / h200.flops_per_s[torch.float32]), "at its own precision"
    rows = MicroBatchMaker(training.method, elsewhere, torch.bfloat16, CPU, counted[1]).rows(BATCH)
    assert rows.peak_s == seconds[1] and not notes

    def fails(section):
        raise KeyError("no such family")

    monkeypatch.setattr("engine.runtime.model_flops.load_target_config", fails)
    assert training_schedule._peak_seconds(training, running, notes.append) is None
    assert len(notes) == 1 and "no such family" in notes[0]


def test_a_method_that_cannot_count_leaves_the_mfu_unknown_and_is_named_once(training, monkeypatch):
    notes: list[str] = []
    calls: list[PackedBatch] = []

    def fails(batch, allowed_ST):
        calls.append(batch)
        raise ZeroDivisionError("no rows")

    monkeypatch.setattr(training.method, "count_work", fails)
    make = MicroBatchMaker(
        training.method, None, torch.bfloat16, CPU, PeakSeconds(training.method, training.draft, 100.0, notes.append)
    )
    assert [make.rows(BATCH).peak_s, make.rows(BATCH).peak_s] == [None, None]
    assert len(calls) == len(notes) == 1 and "ZeroDivisionError: no rows" in notes[0]
