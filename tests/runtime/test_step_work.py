"""The work of a step is that of its micro-batches, and counting it leaves the run as it was."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config.ds_config import load_ds_config
from engine.config.sections import Config, DataSection, DraftSection, TargetSection, TttSection
from engine.data.documents import Document, DocumentList
from engine.data.packed_loader import PackedLoader
from engine.models.method_registry import make_method
from engine.parallel.mesh import ALONE, World
from engine.planning.target_cost import Forward, TargetCost
from engine.runtime.model_flops import CountedTarget
from engine.runtime.step_work import StepWork
from engine.runtime.training_schedule import Training
from engine.target.configuration import load_target_config
from engine.target.structure import without_weights

ACCUMULATION = 3
ZERO2 = Path(__file__).resolve().parents[2] / "ds_configs" / "zero2.json"


@pytest.fixture
def training(tiny_target) -> Training:
    """A run of three micro-batches per step for the tiny target."""
    config = Config(
        target=TargetSection(path=str(tiny_target), aux_layers=(0, 1, 3)),
        data=DataSection(max_tokens=40),
        draft=DraftSection(vocab_size=48),
        ttt=TttSection(steps=3),
    )
    ds_config = load_ds_config(ZERO2) | {"gradient_accumulation_steps": ACCUMULATION}
    method = make_method(config)
    draft = method.derive_config(load_target_config(config.target), (0, 1, 3))
    count_target = partial(CountedTarget.read, config, torch.device("cpu"), 3)
    return Training(config, ds_config, World.alone(), method, draft, torch.bfloat16, 3, count_target)


def loader_of(training: Training, num_documents: int = 40) -> PackedLoader:
    generator = np.random.default_rng(0)
    documents = []
    for number in range(num_documents):
        length = 9 + number % 17
        documents.append(Document(generator.integers(4, 60, length).astype(np.int32), np.arange(length) >= 4, (length,)))
    return PackedLoader.of(DocumentList(documents), training.config, training.ds_config, rank=0, world_size=1)


def flops_by_part(work: StepWork) -> dict[str, float]:
    sums: dict[str, float] = {}
    for piece in work.pieces:
        sums[piece.part] = sums.get(piece.part, 0) + piece.flops
    return sums


def test_it_is_the_mean_over_micro_batches_times_their_number_per_step(training):
    loader = loader_of(training)
    generator_state = torch.get_rng_state()
    work = StepWork.of(training, loader, target_ranks=0)
    assert torch.equal(torch.get_rng_state(), generator_state)
    batches = [loader.micro_batch(*divmod(index, ACCUMULATION), 0) for index in range(work.counted_batches)]
    counted = [training.method.count_work(batch, training.method.allowed_rows(batch)) for batch in batches]
    found = flops_by_part(work)
    of_draft = sum(training.method.step_flops(training.draft, counts) for counts in counted)
    assert found["draft_forward"] + found["backward"] == pytest.approx(of_draft * ACCUMULATION / len(counted))
    section = training.config.target
    target = TargetCost(without_weights(load_target_config(section), section, torch.device("cpu")), ALONE)
    forwards = [Forward(counts.num_tokens, counts.num_slots, counts.prefix_pairs) for counts in counted]
    assert found["target_forward"] == pytest.approx(sum(map(target.flops, forwards)) * ACCUMULATION / len(counted))
    (piece,) = [piece for piece in work.pieces if piece.part == "target_forward"]
    least = sum(target.least_bytes(forward, 3) for forward in forwards)
    assert piece.bytes == pytest.approx(least * ACCUMULATION / len(counted))
    (of_two,) = [piece for piece in StepWork.of(training, loader, 2).pieces if piece.part == "target_forward"]
    assert (of_two.flops, of_two.bytes) == pytest.approx((piece.flops / 2, piece.bytes / 2)), "each has half of the batches"
    assert work.tokens == pytest.approx(sum(batch.num_tokens for batch in batches) / 8) and work.device == "cpu"
    (optimizer,) = [piece for piece in work.pieces if piece.part == "optimizer"]
    assert optimizer.flops == 0 and optimizer.bytes > 24 * training.method.count_weights(training.draft)
    dtypes = {(piece.part, piece.dtype) for piece in work.pieces}
    assert dtypes >= {("target_forward", "float32"), ("backward", "bfloat16")}


def test_a_short_run_is_counted_without_batches_that_do_not_exist(training):
    assert StepWork.of(training, loader_of(training, num_documents=4), 0).counted_batches == ACCUMULATION


def test_a_target_that_cannot_be_built_is_named_and_does_not_end_the_run(training, tmp_path):
    section = replace(training.config.target, path=str(tmp_path / "gone"))
    config = replace(training.config, target=section)
    elsewhere = replace(training, count_target=partial(CountedTarget.read, config, torch.device("cpu"), 3))
    work = StepWork.of(elsewhere, loader_of(training), 2)
    assert work.without_target is not None and "cannot be counted" in work.without_target
    assert "target_forward" not in flops_by_part(work) and flops_by_part(work)["backward"] > 0
    facts = {name: value for name, value in vars(training).items() if name != "count_target"}
    assert StepWork.of(Training(**facts), loader_of(training), 0).without_target == "this job does not run the target"
