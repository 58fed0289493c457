"""What losses are divided by: the gradient follows from the global batch, however it is cut into ranks and micro-batches."""

from itertools import product

import pytest
import torch

from engine.batch import DraftOutput, LossNorms, MicroBatch
from engine.models.eagle3.unroll import TrainingTimeTest
from engine.models.normaliser import Normaliser
from engine.models.training_rows import loss_rows
from engine.parallel.mesh import World
from tests.distributed import run_ranks
from tests.tiny import make_draft, make_micro, make_test
from tests.training import Job, plain_loss, zero_run

ALONE = World(rank=0, size=1, local_rank=0, local_size=1)
JOBS = [
    Job(config, kind=kind, normaliser=how, accumulation=2, sgd=True, num_steps=1)
    for config, kind, how in product(("zero1", "zero3"), ("lk_alpha", "lk_lambda"), ("slots", "positions"))
]


class LocalDraft:
    """Stands in for a ZeroDraft where nothing is distributed."""

    def __init__(self, test: TrainingTimeTest) -> None:
        self.test = test
        self._draft = make_draft()

    def forward(self, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        return self.test(self._draft, micro, norms)


def norms_of(test: TrainingTimeTest, *micros: MicroBatch) -> list[LossNorms]:
    draft = LocalDraft(test)
    return Normaliser(test, draft.forward, ALONE)(list(micros))


def rows_of(test: TrainingTimeTest, *micros: MicroBatch) -> torch.Tensor:
    """Rows with loss of each step over several micro-batches, [S]."""
    rows = [loss_rows(micro.allowed_ST, micro.target, test.teacher.vocab_map) for micro in micros]
    return torch.cat(rows, 1).sum(1)


def test_positions_are_each_micro_batchs_own():
    test = make_test(normaliser="positions")
    micros = make_micro(test, seed=1), make_micro(test, seed=2, lengths=(9,))
    long, short = norms_of(test, *micros)
    assert (long.slots.item(), short.slots.item()) == (40, 9)
    assert torch.equal(long.loss_rows_S.long(), rows_of(test, micros[0]))
    assert torch.equal(short.loss_rows_S.long(), rows_of(test, micros[1]))


def test_slots_are_those_of_all_micro_batches():
    test = make_test()
    micros = make_micro(test, seed=1), make_micro(test, seed=2, lengths=(9,))
    for norms in norms_of(test, *micros):
        assert norms.slots.item() == sum(micro.target.slots_N.numel() for micro in micros)
        assert torch.equal(norms.loss_rows_S.long(), rows_of(test, *micros))
        assert norms.acceptance_S is None


def test_a_global_batch_without_reply_divides_by_one():
    test = make_test()
    (norms,) = norms_of(test, make_micro(test, seed=1, masked=True))
    assert norms.slots.item() == 1
    assert not norms.loss_rows_S.any()


def test_lk_lambda_weighs_by_the_acceptance_of_the_global_batch():
    test = make_test(kind="lk_lambda")
    micros = [make_micro(test, seed=seed, lengths=(9 * seed,)) for seed in (1, 2)]
    norms = norms_of(test, *micros)[0]
    outputs = [LocalDraft(test).forward(micro, norms) for micro in micros]
    accepted_S = sum(output.accepted_S for output in outputs)
    assert torch.allclose(norms.acceptance_S, accepted_S / rows_of(test, *micros))
    assert not norms.acceptance_S.requires_grad


def every_run(world: World) -> dict[Job, tuple[list[float], dict[str, torch.Tensor]]]:
    return {job: zero_run(world, job) for job in JOBS}


@pytest.fixture(scope="module")
def runs() -> dict[Job, tuple[list[float], dict[str, torch.Tensor]]]:
    return run_ranks(every_run, 2)[0]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.config} {job.kind} {job.normaliser}")
def test_two_ranks_with_two_micro_batches_have_the_gradient_of_one_process(runs, job):
    """Under SGD with learning rate 1 a step is the gradient."""
    draft = make_draft()
    loss = plain_loss(draft, job.test(), job.global_micros(0))
    loss.backward()
    (zero_loss,), weights = runs[job]
    assert zero_loss == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in draft.named_parameters():
        gradient = parameter.detach() - weights[name]
        assert (gradient - parameter.grad).norm() < 1e-4 * parameter.grad.norm(), name


def test_slots_do_not_depend_on_how_the_batch_is_cut(runs):
    """`positions` does: a mean of means weighs the rows of small micro-batches more."""
    whole = {}
    for normaliser in ("slots", "positions"):
        job = Job("zero1", kind="lk_alpha", normaliser=normaliser, accumulation=2, sgd=True, num_steps=1)
        as_one = plain_loss(make_draft(), make_test(kind="lk_alpha"), job.global_micros(0)).item()
        whole[normaliser] = runs[job][0][0] / as_one
    assert whole["slots"] == pytest.approx(1, rel=1e-6)
    assert abs(whole["positions"] - 1) > 1e-5
