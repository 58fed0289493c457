"""ZeRO on two ranks changes where weights live, never what is learned, and moves every weight once however often it is used."""

import sys
import types
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from engine.models.normaliser import Normaliser
from engine.parallel import zero as zero_module
from engine.parallel.mesh import World
from engine.parallel.zero import ZeroDraft, make_optimizer
from tests.collectives import CountCollectives, Issued
from tests.distributed import run_ranks
from tests.tiny import make_draft
from tests.training import Job, plain_run, zero_run, zero_step

STAGES = ("zero0", "zero1", "zero2", "zero3")
OFFLOADS = ("zero2_offload", "zero3_offload")
# Rank 1 has no reply, then rank 0 documents of one token only, then neither rank anything to learn.
EMPTY = ((0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1))
ACCUMULATED = [Job(config, accumulation=2, normaliser=how) for config, how in product(STAGES, ("slots", "positions"))]
NUM_STEPS = 5  # batches come round every four steps
FP32 = [Job(config, num_steps=NUM_STEPS) for config in STAGES + OFFLOADS]
FP32 += [replace(job, num_steps=NUM_STEPS) for job in ACCUMULATED]
FP32 += [Job("zero3", recompute=what, num_steps=NUM_STEPS) for what in ("mlp", "step")]
BF16 = [Job(config, bf16=True, num_steps=NUM_STEPS) for config in STAGES + OFFLOADS]
GRADIENT = [replace(job, sgd=True, num_steps=1) for job in ACCUMULATED]
OF_KINDS = [*product(STAGES, ("kl",)), ("zero2", "lk_lambda"), ("zero3", "lk_lambda")]
SPARSE = [Job(config, kind=kind, num_steps=NUM_STEPS, empty=EMPTY) for config, kind in OF_KINDS]
MUON = [Job(config, muon=True, accumulation=2, num_steps=4) for config in STAGES]
HALVED = [replace(job, normaliser="slots") for job in GRADIENT if job.normaliser == "slots"]
COUNTED = [
    Job("zero3", kind=kind, ttt_steps=steps, bf16=bf16, num_steps=3, accumulation=2, empty=((1, 0), (2, 1)))
    for kind, steps, bf16 in [("kl", 1, True), ("kl", 7, False), ("lk_lambda", 2, False)]
]
COUNTED.append(Job("zero3", ttt_steps=2, num_steps=3, accumulation=2, empty=((1, 0), (2, 1)), recompute="step"))


def name(job: Job) -> str:
    changed = [f"{key}={value}" for key, value in vars(job).items() if value != getattr(Job, key, None) and key != "empty"]
    return " ".join(changed).removeprefix("config=")


def count_run(world: World, job: Job) -> list[Issued]:
    """What each optimizer step issues, the first two included, in which DeepSpeed still learns the order of modules."""
    zero = ZeroDraft(job.draft(), job.test(), job.ds_config())
    normalise = Normaliser(zero.objective, lambda micro, norms: zero.forward(micro, norms), world)  # the watched one
    steps = []
    for step in range(job.num_steps):
        micros = job.micros(step, world.rank)
        counter = CountCollectives()
        counter.watch("forward", zero, "forward")
        counter.watch("backward", zero.engine, "backward")
        counter.count("fetch", zero.engine.optimizer.parameter_offload.get_param_coordinator(), "fetch_sub_module")
        with counter:
            zero_step(zero, normalise, world, micros)
        steps.append(counter.issued)
    return steps


def half_run(world: World, job: Job) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights after a step at half the learning rate, and the rates of the next step."""
    zero = ZeroDraft(job.draft(), job.test(), job.ds_config())
    zero.rate_factor = 0.5
    normalise = Normaliser(zero.objective, zero.forward, world)
    zero_step(zero, normalise, world, job.micros(0, world.rank))
    assert zero.learning_rate == 0.5
    return dict(zero.gathered_weights()), [group["lr"] for group in zero.engine.optimizer.param_groups]


def every_run(world: World) -> dict[Any, Any]:
    plain_linear = torch.nn.functional.linear
    runs = {job: zero_run(world, job) for job in (*FP32, *BF16, *GRADIENT, *SPARSE, *MUON)}
    halved = {("half", job): half_run(world, job) for job in HALVED}
    counted = {job: count_run(world, job) for job in COUNTED}
    return runs | halved | counted | {"keeps linear": torch.nn.functional.linear is plain_linear}


@pytest.fixture(scope="module")
def by_rank() -> list[dict]:
    """Results of every job on each of two ranks."""
    return run_ranks(every_run, 2)


@pytest.fixture(scope="module")
def runs(by_rank) -> dict[Job, tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses of every job, the same on both ranks, and the weights that rank 0 gathered."""
    first, second = by_rank
    assert all(first[job][0] == second[job][0] for job in first if job not in COUNTED and isinstance(job, Job))
    return first


def relative(losses: list[float], expected: list[float]) -> float:
    """Largest relative difference; a loss of nothing is 0 on both sides."""
    assert len(losses) == len(expected)
    return max(abs(loss - wanted) / (abs(wanted) or 1) for loss, wanted in zip(losses, expected, strict=True))


def drift(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Distance between two trained drafts, of the way that training went."""
    start = dict(make_draft().named_parameters())
    apart = torch.cat([(weights[key] - expected[key]).flatten() for key in expected])
    moved = torch.cat([(start[key] - expected[key]).flatten() for key in expected])
    assert weights.keys() == expected.keys()
    return (apart.norm() / moved.norm()).item()


@pytest.mark.parametrize("job", FP32, ids=name)
def test_every_stage_learns_what_plain_pytorch_learns(runs, job):
    losses, weights = runs[job]
    expected, expected_weights = plain_run(job)
    assert relative(losses, expected) < 1e-5
    assert drift(weights, expected_weights) < 1e-4
    assert losses[-1] < losses[-5], "batches come round every four steps; their loss must have fallen"


@pytest.mark.parametrize("job", BF16, ids=name)
def test_bf16_stays_within_rounding_of_fp32(runs, job):
    """A bf16 logit is off by up to 2**-9 of itself; the loss, an average of fp32 terms over more than 60 rows a step, by less.

    Sixteen independent errors already average to 2**-11. Nothing compounds over the steps: each stage keeps fp32 weights for
    its optimizer, stage 0 too. Stages 0 to 2 sum the same gradients, so they start as one, until a weight falls on the other
    side of a rounding; stage 3 halves gradients before it sums them.
    """
    losses, _ = runs[job]
    assert relative(losses, runs[replace(job, bf16=False)][0]) < 2**-11
    if not job.config.startswith("zero3"):
        of_zero1 = runs[Job("zero1", bf16=True, num_steps=NUM_STEPS)][0]
        assert relative(losses[:1], of_zero1[:1]) < 1e-6
        assert relative(losses[:4], of_zero1[:4]) < 2**-11


@pytest.mark.parametrize("job", GRADIENT, ids=name)
def test_gradient_has_the_scale_of_the_global_batch(runs, job):
    """Under SGD a weight's change is its gradient. DeepSpeed's mean is undone for `slots` and kept for `positions`."""
    assert drift(runs[job][1], plain_run(job)[1]) < 1e-5


@pytest.mark.parametrize("job", MUON, ids=name)
def test_muon_learns_what_torch_s_muon_learns(runs, job):
    """Both orthogonalise in half precision, by other formulas."""
    losses, weights = runs[job]
    expected, expected_weights = plain_run(job)
    assert relative(losses, expected) < 2**-10 and drift(weights, expected_weights) < 2**-6
    assert relative(losses, runs[MUON[0]][0]) < 1e-5
    # Sums in another order change the last digit, which becomes a digit of bfloat16 in the orthogonalisation.
    assert drift(weights, runs[MUON[0]][1]) < 2**-9


@pytest.mark.parametrize("job", HALVED, ids=name)
def test_a_step_at_half_the_rate_goes_half_the_way_and_the_next_has_the_whole_rate(runs, job):
    """Over two accumulated micro-batches, at each of which DeepSpeed's `step` is called."""
    weights, rates = runs["half", job]
    start = dict(make_draft().named_parameters())
    halfway = {key: (start[key].detach() + runs[job][1][key]) / 2 for key in weights}
    assert drift(weights, halfway) < 1e-5 and rates == [1.0] * len(rates)


@pytest.mark.parametrize("job", SPARSE, ids=name)
def test_ranks_without_loss_change_nothing_for_the_others(runs, job):
    losses, weights = runs[job]
    expected, expected_weights = plain_run(job)
    assert losses[2] == losses[3] == 0
    assert relative(losses, expected) < 1e-5
    assert drift(weights, expected_weights) < 1e-4


@pytest.mark.parametrize("job", COUNTED, ids=name)
def test_each_weight_is_gathered_once_a_pass_and_reduced_once_a_micro_batch(by_rank, job):
    """Whatever the number of TTT steps; DeepSpeed pads each weight to a multiple of the ranks."""
    sizes = [parameter.numel() for parameter in make_draft().parameters()]
    item_bytes = 2 if job.bf16 else 4
    once = sum(sizes) * item_bytes
    padded = sum(size + size % 2 for size in sizes) * item_bytes
    for issued in by_rank[0][job]:
        passes = job.accumulation * (2 if job.kind == "lk_lambda" else 1)  # lk_lambda measures acceptance in a pass of its own
        fetches = passes + job.accumulation  # DeepSpeed's hooks see one module, once in each pass
        assert issued.begun == {"forward": passes, "backward": job.accumulation, "fetch": fetches}
        assert once <= issued.num_bytes("forward", "allgather") <= passes * padded
        assert issued.num_bytes("backward", "allgather") <= job.accumulation * padded
        assert job.accumulation * once <= issued.num_bytes("backward", "reduce_scatter") <= job.accumulation * padded
        others = [
            call for call in issued.calls if "allgather" not in call[1] and call[:2] != ("backward", "_reduce_scatter_base_")
        ]
        assert sum(size for _, _, size in others) < 0.2 * once, "only norms, counts and DeepSpeed's own checks"


@pytest.mark.parametrize("job", COUNTED, ids=name)
def test_ranks_without_loss_issue_the_same_collectives(by_rank, job):
    assert [issued.calls for issued in by_rank[0][job]] == [issued.calls for issued in by_rank[1][job]]


def test_no_stage_replaces_functions_of_pytorch_for_the_whole_process(by_rank):
    assert all(runs["keeps linear"] for runs in by_rank)


@pytest.fixture
def adam_config() -> dict:
    params = {"lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.5}
    return {"optimizer": {"type": "AdamW", "params": params}}


@pytest.fixture
def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def test_on_cpu_adamw_is_torchs_with_the_options_of_the_configuration(parameters, adam_config):
    optimizer = make_optimizer(parameters, adam_config)
    assert type(optimizer) is torch.optim.AdamW
    options = adam_config["optimizer"]["params"]
    assert tuple(optimizer.defaults["betas"]) == tuple(options["betas"])
    assert all(optimizer.defaults[key] == options[key] for key in ("lr", "eps", "weight_decay"))


def test_deepspeed_builds_other_optimizers_and_offloaded_ones(parameters, adam_config):
    assert make_optimizer(parameters, {"optimizer": {"type": "Lion", "params": {}}}) is None
    offload = {"offload_optimizer": {"device": "cpu"}}
    assert make_optimizer(parameters, adam_config | {"zero_optimization": offload}) is None


@pytest.fixture
def on_a_gpu(monkeypatch) -> dict:
    """A machine with a GPU, as far as the choice of an optimizer goes; what torch's AdamW is asked for."""
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **options: asked.update(options) or "torch's")
    return asked


@pytest.fixture
def nvidia_apex(monkeypatch) -> None:
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = lambda parameters, **options: ("apex's", options)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


@pytest.fixture
def pypi_apex(monkeypatch) -> None:
    """The unrelated package that PyPI calls apex."""
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)


@pytest.fixture
def deepspeeds_adam(monkeypatch) -> list:
    """Stands for DeepSpeed's FusedAdam; what it was asked for."""
    asked = []
    adam = types.SimpleNamespace(FusedAdam=lambda parameters, **options: asked.append(options) or "deepspeed's")
    monkeypatch.setattr(zero_module.deepspeed.ops, "adam", adam)
    return asked


def test_nvidia_apex_comes_first_on_a_gpu(nvidia_apex, on_a_gpu, parameters, adam_config):
    name, options = make_optimizer(parameters, adam_config)
    assert name == "apex's"
    assert options == {"lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.5}
    adam_config["optimizer"]["params"]["torch_adam"] = True
    assert make_optimizer(parameters, adam_config) == "torch's"


def test_without_apex_torchs_fused_adamw_runs_and_nothing_is_compiled(
    pypi_apex, on_a_gpu, deepspeeds_adam, parameters, adam_config
):
    assert make_optimizer(parameters, adam_config) == "torch's"
    assert on_a_gpu == {"lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.5, "fused": True}
    assert deepspeeds_adam == []


def test_deepspeeds_fused_adam_runs_on_request_alone(nvidia_apex, on_a_gpu, deepspeeds_adam, parameters, adam_config):
    adam_config["optimizer"]["params"]["torch_adam"] = False
    assert make_optimizer(parameters, adam_config) == "deepspeed's"
    assert deepspeeds_adam == [{"lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.5}]


def test_a_fused_adam_that_cannot_be_compiled_is_named(on_a_gpu, monkeypatch, parameters, adam_config):
    def fails(parameters, **options):
        raise RuntimeError("Error building extension 'fused_adam':\nnvcc fatal: unsupported gpu architecture")

    monkeypatch.setattr(zero_module.deepspeed.ops, "adam", types.SimpleNamespace(FusedAdam=fails))
    adam_config["optimizer"]["params"]["torch_adam"] = False
    with pytest.raises(ValueError, match=r"optimizer\.params\.torch_adam = false.*nvcc fatal"):
        make_optimizer(parameters, adam_config)
