"""Block drafters train through the engine as EAGLE-3 does: under ZeRO, from a store, over a resume, and into a served draft."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from engine.batch import MicroBatch
from engine.config.block_sections import BlockSection
from engine.config.ds_config import load_ds_config, resolve_ds_config
from engine.config.sections import Config, ConfigError, DraftSection
from engine.config.tree_shape import TreeShape
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.method_registry import make_method
from engine.models.normaliser import Normaliser
from engine.parallel.mesh import World
from engine.parallel.zero import ZeroDraft
from tests.block_drafts import make_batch, make_config, make_draft, make_method_of, make_micro, make_objective, norms_of
from tests.distributed import ONE_THREAD, launch, run_ranks

ROOT = Path(__file__).resolve().parents[3]
RANKS = 2
LR = 1e-2
NUM_STEPS = 4


@dataclass(frozen=True)
class Job:
    """Training of a tiny block drafter; rank 1 has no loss in the second step."""

    name: str
    ds_config: str

    @property
    def method(self) -> BlockMethod:
        # With all tokens as candidates, no rounding decides which of them the selector sees.
        own = {"dspark": {"markov_head": "rnn"}, "dflash2": {"selector_top_k": 96}, "dflash": {}}
        return make_method_of(self.name, **own[self.name])

    def micros(self, step: int, rank: int) -> list[MicroBatch]:
        micros = []
        for index in range(2):
            batch = make_batch((17, 23 - 6 * rank), seed=10 * step + 2 * rank + index)
            if step == 1 and rank == 1:
                batch = replace(batch, assistant_mask_T=torch.zeros_like(batch.assistant_mask_T))
            micros.append(make_micro(self.method, batch, seed=step))
        return micros


JOBS = [
    Job("dspark", "zero2"),
    Job("dspark", "zero3"),
    Job("dflash2", "zero2"),
    Job("dflash2", "zero3"),
    Job("dflash", "zero3"),
]


def zero_run(world: World, job: Job) -> tuple[list[float], dict[str, torch.Tensor]]:
    raw = load_ds_config(ROOT / "ds_configs" / f"{job.ds_config}.json")
    raw["gradient_accumulation_steps"] = 2
    raw["bf16"]["enabled"] = False
    del raw["scheduler"]
    if raw["zero_optimization"]["stage"] == 3:
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    resolved = resolve_ds_config(raw, world_size=RANKS, total_steps=NUM_STEPS, hidden_size=32)
    resolved |= {"optimizer": {"type": "SGD", "params": {"lr": LR}}, "zero_allow_untested_optimizer": True}
    resolved["gradient_clipping"] = 0.0
    zero = ZeroDraft(make_draft(job.method), make_objective(job.method), resolved)
    normalise = Normaliser(zero.objective, zero.forward, world)
    losses = []
    for step in range(NUM_STEPS):
        micros = job.micros(step, world.rank)
        outputs = [zero.train(micro, norms) for micro, norms in zip(micros, normalise(micros), strict=True)]
        losses.append(world.sum(sum(output.loss.detach() for output in outputs)).item())
    return losses, {name: weight.float() for name, weight in zero.gathered_weights()}


def every_run(world: World) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    return [zero_run(world, job) for job in JOBS]


@pytest.fixture(scope="module")
def runs() -> list:
    return run_ranks(every_run, RANKS)[0]


@pytest.mark.parametrize("index", range(len(JOBS)), ids=[f"{job.name} {job.ds_config}" for job in JOBS])
def test_zero_learns_what_plain_pytorch_learns(runs, index):
    job = JOBS[index]
    draft = make_draft(job.method)
    objective = make_objective(job.method)
    losses, weights = runs[index]
    for step in range(NUM_STEPS):
        micros = [micro for rank in range(RANKS) for micro in job.micros(step, rank)]
        norms = norms_of(objective, micros)
        loss = sum(objective(draft, micro, norms).loss for micro in micros)
        draft.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter -= LR * parameter.grad
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(weights[name], parameter, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_corpus, tiny_target) -> list[str]:
    """Options of a DSpark job on a tiny target."""
    return [
        f"target.path={tiny_target}",
        f"data.train=[{tiny_corpus.train}]",
        f"data.held_out=[{tiny_corpus.held_out}]",
        "target.aux_layers=[0,1,2]",
        "data.max_tokens=128",
        "draft.method=dspark",
        "draft.num_layers=2",
        "block.size=4",
        "block.anchors=40",
        "block.mask_token_id=0",
        "block.markov_rank=8",
        "evaluation.num_steps=4",
        "evaluation.num_prompts=2",
        "evaluation.max_new_tokens=8",
        "max_steps=4",
        ONE_THREAD,
    ]


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(folder: Path, *options: str, ranks: int = 1) -> list[float]:
    done = launch(["launcher/train.py", "--ds_config", "ds_configs/zero2.json", f"output_dir={folder}", *options], ranks)
    assert done.returncode == 0, done.stderr
    return losses_of(folder)


def test_a_run_from_a_store_and_a_resumed_one_are_the_online_one(options, tmp_path):
    expected = train(tmp_path / "online", *options, "checkpoint.every_steps=2", "epochs=2")
    summary = json.loads((tmp_path / "online" / "summary.json").read_text())
    assert summary["after"]["mismatches"] == 0
    assert json.loads((tmp_path / "online" / "draft" / "config.json").read_text())["architectures"] == ["Qwen3DSparkModel"]

    store = f"target.store={tmp_path / 'store'}"
    captured = launch(["launcher/capture_hidden_states.py", *options, store])
    assert captured.returncode == 0, captured.stderr
    assert train(tmp_path / "offline", *options, store, "epochs=2") == expected

    (tmp_path / "online" / "checkpoints" / "step_4").rename(tmp_path / "gone")
    assert train(tmp_path / "online", *options, "checkpoint.resume=auto", "epochs=2") == expected


def test_a_target_that_ranks_share_or_that_has_a_rank_of_its_own_teaches_the_same(options, tmp_path):
    job = [option for option in options if not option.startswith("evaluation.num_prompts")] + ["evaluation.num_prompts=0"]
    whole = train(tmp_path / "whole", *job, ranks=2)
    sharing = ("parallel.tp_size=2", "overlap.placement=colocated", "overlap.check_order=true")
    shared = train(tmp_path / "shared", *job, *sharing, ranks=2)
    assert shared == pytest.approx(whole, rel=1e-3), "the draft rounds to bf16, other sums of the target another way"
    alone = train(tmp_path / "alone", *job, "overlap.placement=serial")
    split = train(tmp_path / "split", *job, "overlap.placement=split", "overlap.target_ranks=1", ranks=2)
    assert split == alone


def test_a_store_for_hard_labels_holds_no_target_distributions(options, tmp_path):
    replaced = ("draft.method", "evaluation.num_steps", "evaluation.num_prompts", "block.markov_rank")
    hard = [option for option in options if not option.startswith(replaced)]
    hard += ["draft.method=dflash", "evaluation.num_prompts=0"]  # with the default of 5 drafted tokens, which nobody drafts
    store = f"target.store={tmp_path / 'store'}"
    captured = launch(["launcher/capture_hidden_states.py", *hard, store])
    assert captured.returncode == 0, captured.stderr
    (shard,) = json.loads((tmp_path / "store" / "manifest.json").read_text())["shards"]
    assert shard["num_slots"] == 0
    assert train(tmp_path / "offline", *hard, store) == train(tmp_path / "online", *hard)


def test_the_size_of_a_block_limits_what_is_drafted():
    method = make_method_of("dflash")
    config = make_config(method)
    method.check_shape(TreeShape(4), config)
    with pytest.raises(ConfigError, match=r"evaluation\.num_steps = 5.*drafts 4 tokens"):
        method.check_shape(TreeShape(5), config)
    with pytest.raises(ConfigError, match=r"evaluation\.topk = 2"):
        method.check_shape(TreeShape(3, 2, 6), config)


def test_options_of_another_method_are_refused():
    with pytest.raises(ConfigError, match=r"block\.size = 8.*block drafters"):
        Config(block=BlockSection(size=8))
    with pytest.raises(ConfigError, match=r"draft\.hidden_size = 64.*DFlash"):
        make_method(Config(draft=DraftSection(method="dflash", hidden_size=64)))


def test_a_mask_token_that_occurs_in_the_data_is_refused():
    method = make_method_of("dflash")
    config = make_config(method)
    counts_V = torch.ones(96, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"block\.mask_token_id = 95.*occurs 1 times"):
        method.check_data(counts_V, config)
    counts_V[95] = 0
    method.check_data(counts_V, config)
