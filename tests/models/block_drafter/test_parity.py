"""`objective.parity` alone selects another trainer's blocks, rows, losses and divisors."""

import math
from dataclasses import replace

import pytest
import torch

from engine.batch import LossNorms, MicroBatch, PackedBatch
from engine.kernels import TokenTerms
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.block_drafter.block_objective import BlockObjective
from engine.models.dflash2.dflash2_draft import DFlash2Objective
from engine.models.normaliser import Normaliser
from engine.parallel.mesh import World
from engine.parallel.zero import ZeroDraft
from tests.block_drafts import (
    MASK_TOKEN,
    METHODS,
    gradients,
    make_batch,
    make_draft,
    make_method_of,
    make_micro,
    make_objective,
    make_tables,
    norms_of,
)
from tests.distributed import run_ranks
from tests.models.block_drafter.plain_trainers import Text, Trainer, plain_loss
from tests.training import Job

SIZE = 5
DECAY = 4.0
NAMES = ("none", "specforge", "automodel", "speculators")
TRAINERS = [Trainer(name, method, SIZE, DECAY) for name in NAMES for method in METHODS]
TRAINERS.append(Trainer("deepspec", "dspark", SIZE, DECAY))
TRAINERS += [
    Trainer("none", "dflash", SIZE, DECAY, is_dpace=True),
    Trainer("specforge", "dflash", SIZE, DECAY, is_dpace=True),
    *(Trainer("speculators", method, SIZE, DECAY, is_dpace=True) for method in ("dflash", "dspark", "dflash2")),
]
# Windows, one of them smaller than a block.
TRAINERS += [
    Trainer("none", "dflash", SIZE, DECAY, windows=(3, 7), is_causal=True),
    Trainer("specforge", "dflash", SIZE, DECAY, windows=(3, 7), is_causal=True),
    Trainer("automodel", "dflash", SIZE, DECAY, windows=(3, 7)),
    Trainer("speculators", "dflash", SIZE, DECAY, windows=(3, 7), is_causal=True),
    Trainer("speculators", "dspark", SIZE, DECAY, windows=(3, 7), is_causal=True),
    Trainer("speculators", "dflash2", SIZE, DECAY, windows=(3, 0)),
]


def name_of(trainer: Trainer) -> str:
    windows = f" windows {trainer.windows}" if any(trainer.windows) else ""
    return f"{trainer.name} {trainer.method}{' dpace' if trainer.is_dpace else ''}{windows}"


def make_gaps() -> PackedBatch:
    """Documents with gaps in their masks; the replies of the second and the last begin with their second token."""
    batch = make_batch((17, 12, 21, 9))
    mask_T = batch.assistant_mask_T.clone()
    mask_T[17 + 1 : 17 + 12] = True
    mask_T[50 + 1 :] = True
    mask_T[[10, 24, 42, 44]] = False
    return replace(batch, assistant_mask_T=mask_T)


def text_of(micro: MicroBatch) -> Text:
    tables = make_tables()
    every_T = torch.arange(micro.batch.num_tokens)
    generator = torch.Generator().manual_seed(0)
    last_hidden_TD = torch.randn(micro.batch.num_tokens, tables.head.weight_VD.shape[1], generator=generator)
    assert torch.equal(last_hidden_TD[micro.target.slots_N], micro.target.last_hidden_ND)
    embed_VD = tables.embedding.rows(torch.arange(MASK_TOKEN + 1))
    assert torch.equal(embed_VD[micro.batch.input_ids_T], micro.embed_TD[every_T])
    return Text(
        micro.batch,
        micro.target.aux_TA.double(),
        last_hidden_TD.double(),
        embed_VD.double(),
        tables.head.weight_VD.double(),
        MASK_TOKEN,
    )


@pytest.mark.parametrize("trainer", TRAINERS, ids=name_of)
def test_parity_alone_gives_the_trainer_s_loss_and_gradients(trainer):
    objective = {"parity": trainer.name, "weights": "dpace" if trainer.is_dpace else "decay"}
    method = make_method_of(trainer.method, objective=objective, windows=trainer.windows, causal=trainer.is_causal)
    draft = make_draft(method)
    micro = make_micro(method, make_gaps())
    learned = make_objective(method)
    output = learned(draft, micro, norms_of(learned, [micro]))
    found = gradients(draft, output.loss)

    weights = {name: weight.detach().double().requires_grad_() for name, weight in draft.named_parameters()}
    expected = plain_loss(trainer, weights, text_of(micro))
    assert output.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert (output.loss_S * torch.tensor(learned.step_weights)).sum().item() == pytest.approx(expected.item(), rel=2e-6)
    derivatives = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)
    whole = sum(gradient.square().sum() for gradient in derivatives if gradient is not None).sqrt()
    for (name, weight), gradient in zip(weights.items(), derivatives, strict=True):
        gradient = torch.zeros_like(weight) if gradient is None else gradient
        assert (found[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * whole), name


def test_the_recipe_overrides_what_parity_sets():
    own = {"cross_entropy": 1.0, "kl": 0.0, "selector_inject": False, "selector_normaliser": "covered", "label": "token"}
    learned = make_objective(make_method_of("dflash2", objective={"parity": "speculators", **own}))
    assert isinstance(learned, DFlash2Objective)
    assert learned.rule.terms == TokenTerms(cross_entropy=1.0)
    assert learned.divides_by_covered and not learned.injects and not learned.rule.uses_argmax
    same = make_objective(make_method_of("dflash2", objective={"parity": "automodel", "selector_normaliser": "same"}))
    assert isinstance(same, DFlash2Objective) and not same.divides_by_covered
    kept = make_method_of("dspark", objective={"parity": "speculators", "weights": "dpace", "decay": 2.0})
    assert kept.rule.decayed_weights(2)[1] == pytest.approx(math.exp(-1 / 2))


def test_divisors_have_the_offsets_of_the_trainers():
    """They are too small to show in a loss in single precision."""
    offsets = {"none": 0, "deepspec": 1e-6, "specforge": 0, "automodel": 1e-6, "speculators": 1e-5}
    for name, offset in offsets.items():
        assert make_method_of("dflash", objective={"parity": name}).rule.divisor_offset == offset


SCOPES = {
    ("none", "dflash", "decay"): "global batch",
    ("none", "dspark", "decay"): "global batch",
    ("deepspec", "dspark", "decay"): "ranks",
    ("specforge", "dflash", "decay"): "global batch",
    ("specforge", "dflash", "dpace"): "global batch",
    ("specforge", "dspark", "decay"): "ranks",
    ("automodel", "dflash", "decay"): "micro-batch",
    ("automodel", "dspark", "decay"): "ranks",
    ("automodel", "dflash2", "decay"): "micro-batch",
    ("speculators", "dflash", "decay"): "micro-batch",
    ("speculators", "dspark", "decay"): "micro-batch",
}
# Each row is an accumulation step, each column a rank; all micro-batches have another number of rows.
LENGTHS = (((17, 23), (9,)), ((30,), (12, 8, 21)))


def micro_of(method: BlockMethod, step: int, rank: int) -> MicroBatch:
    return make_micro(method, make_batch(LENGTHS[step][rank], seed=10 * step + rank), seed=10 * step + rank)


def scope_method(key: tuple[str, str, str]) -> BlockMethod:
    parity, name, weights = key
    return make_method_of(name, objective={"parity": parity, "weights": weights})


def take_steps(world: World) -> dict[tuple[str, str, str], tuple[float, dict[str, torch.Tensor]]]:
    """Take a step with each parity; returns its loss over all ranks and the weights after it."""
    job = Job("zero1", accumulation=len(LENGTHS), sgd=True, num_steps=1)
    results = {}
    for key in SCOPES:
        method = scope_method(key)
        zero = ZeroDraft(make_draft(method), make_objective(method), job.ds_config())
        micros = [micro_of(method, step, world.rank) for step in range(len(LENGTHS))]
        norms = Normaliser(zero.objective, zero.forward, world)(micros)
        outputs = [zero.train(micro, norm) for micro, norm in zip(micros, norms, strict=True)]
        total = world.sum(sum(output.loss.detach() for output in outputs)).item()
        num_means = zero.objective.divisor_scope.num_means(world.size, len(micros))
        results[key] = total / num_means, {name: weight.float() for name, weight in zero.gathered_weights()}
    return results


@pytest.fixture(scope="module")
def steps() -> dict[tuple[str, str, str], tuple[float, dict[str, torch.Tensor]]]:
    return run_ranks(take_steps, 2)[0]


def share_of(objective: BlockObjective, micro: MicroBatch, scope_key: tuple[str, str, str]) -> float:
    parity, _, weights = scope_key
    if weights == "dpace":
        return len(micro.batch.host_lengths)
    counts_S = micro.allowed_ST.sum(1).double()
    if parity == "speculators":
        return counts_S.sum().item()
    decay_S = torch.exp(-torch.arange(len(counts_S), dtype=torch.float64) / DECAY)
    return (counts_S * decay_S).sum().item()


@pytest.mark.parametrize("key", SCOPES, ids=" ".join)
def test_two_ranks_divide_by_the_sums_that_the_trainer_does(steps, key):
    """Under SGD with learning rate 1 a step is the gradient."""
    method = scope_method(key)
    draft = make_draft(method)
    objective = make_objective(method)
    micros = [[micro_of(method, step, rank) for rank in range(2)] for step in range(2)]
    shares = torch.tensor([[share_of(objective, micro, key) for micro in row] for row in micros], dtype=torch.float64)
    divisors = {
        "global batch": shares.sum().expand(2, 2),
        "ranks": 2 * shares.sum(1, keepdim=True).expand(2, 2),
        "micro-batch": 4 * shares,
    }[SCOPES[key]]
    loss = torch.zeros(())
    for step in range(2):
        for rank in range(2):
            micro = micros[step][rank]
            own = shares[step, rank].float()
            # A loss over a micro-batch alone, times its share: the sum that is divided.
            output = objective(draft, micro, LossNorms(own, micro.allowed_ST.sum(1).float()))
            loss = loss + output.loss * (own / divisors[step, rank].float())
    loss.backward()
    step_loss, weights = steps[key]
    assert step_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.detach() - weights[name]
            assert (gradient - parameter.grad).norm() < 1e-4 * max(parameter.grad.norm(), 1e-2), name
