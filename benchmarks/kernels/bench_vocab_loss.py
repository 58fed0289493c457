"""Time the vocabulary loss and its gradients, next to the matrix products alone.

    python -m benchmarks.kernels.bench_vocab_loss --shapes '8b-4096x7-*'

Run from the repository's root. A shape's name gives the model, slots x TTT steps, and the loss;
every slot has one row per step. `reference` is plain PyTorch. `deferred` and `fused` compute the
loss in chunks, `fused` with a Triton kernel. `products` runs only the matrix products: a measured
floor next to the computed one of engine/models/costs.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Place, Provider, main
from engine.config.sections import LossSection, TttSection
from engine.kernels import reference
from engine.kernels.interface import LossRows, RowWeights, SlotTargets, VocabLoss
from engine.kernels.matmul import product
from engine.kernels.vocab_loss import LossPass, vocab_loss
from engine.models.costs import StepPart, frozen_head_part, head_part
from engine.models.eagle3.row_plan import plan_rows
from engine.models.eagle3.unroll import Teacher, TrainingTimeTest
from engine.models.vocab_map import VocabMap
from engine.target.head import TargetHead


@dataclass(frozen=True)
class LossShape:
    """Sizes of a loss. kind: value of `loss.kind`, "kl" or "lk_alpha"."""

    num_slots: int
    steps: int
    hidden_size: int
    draft_vocab_size: int
    kind: str

    @property
    def num_rows(self) -> int:
        return self.num_slots * self.steps


@dataclass(frozen=True)
class LossTensors:
    """Arguments of the loss. Gradients are computed for hidden_RD and weight_UD."""

    hidden_RD: Tensor
    weight_UD: Tensor
    teacher: TargetHead
    rows: LossRows
    targets: SlotTargets
    weights: RowWeights


def _shapes() -> dict[str, LossShape]:
    """Return shapes of Llama-3.1-8B, Llama-3.3-70B and Kimi-K2, and a small one for a CPU.

    Their widths are those of launcher/recipes.
    """
    sizes = {"8b": (4096, 32000), "70b": (8192, 32000), "kimi": (7168, 32000), "cpu": (512, 8000)}
    counts = {"8b": ((512, 7), (4096, 1), (4096, 7), (16384, 7)), "70b": ((4096, 7),), "kimi": ((4096, 7),), "cpu": ((256, 7),)}
    return {
        f"{name}-{num_slots}x{steps}-{kind}": LossShape(num_slots, steps, *size, kind)
        for name, size in sizes.items()
        for num_slots, steps in counts[name]
        for kind in ("kl", "lk_alpha")
    }


def prepare(shape: LossShape, place: Place) -> LossTensors:
    """Create the tensors of a shape.

    Logits of the draft and the target differ by a few nats. Chunks are as large as in training.
    """
    torch.manual_seed(0)
    num_slots = shape.num_slots
    steps = shape.steps
    size = shape.hidden_size
    vocab_size = shape.draft_vocab_size

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*sizes, device=place.device, dtype=place.dtype) * scale

    teacher = TargetHead(draw(vocab_size, size, scale=3 * size**-0.5))
    hidden_ND = draw(num_slots, size)
    draft_id_N, lse_N = teacher.argmax_and_lse(hidden_ND)
    vocab_map = VocabMap.whole(vocab_size, place.device)
    test = TrainingTimeTest(TttSection(steps=steps), LossSection(), Teacher(teacher.logits, vocab_map))
    carries_loss_ST = torch.ones(steps, num_slots, dtype=torch.bool, device=place.device)
    slot_ST = torch.arange(num_slots, device=place.device).expand(steps, -1)
    cu_seqlens = torch.tensor([0, num_slots], device=place.device)
    per_row_S = torch.full((steps,), 1 / num_slots, device=place.device)
    is_kl = shape.kind == "kl"
    return LossTensors(
        draw(shape.num_rows, size).requires_grad_(),
        draw(vocab_size, size, scale=3 * size**-0.5).requires_grad_(),
        teacher,
        plan_rows(
            carries_loss_ST, slot_ST, cu_seqlens, test.slots_within_budget(LossPass(), place.dtype), compaction=True
        ).loss,
        # The larger log-sum-exp puts a tenth of the probability outside the draft vocabulary.
        SlotTargets(hidden_ND, teacher.logits, lse_N + 0.1, draft_id_N.long()),
        RowWeights(per_row_S) if is_kl else RowWeights(torch.zeros_like(per_row_S), log_acceptance_S=per_row_S),
    )


def setup(provider: Callable[[LossTensors], object], tensors: LossTensors) -> Callable[[], object]:
    return partial(provider, tensors)


def _with_gradients(loss: Callable[..., VocabLoss], tensors: LossTensors) -> object:
    leaves = [tensors.hidden_RD, tensors.weight_UD]
    result = loss(*leaves, tensors.rows, tensors.targets, tensors.weights)
    return torch.autograd.grad(result.total, leaves)


@torch.no_grad()
def _products(tensors: LossTensors) -> object:
    """Compute the target's logits, the draft's logits and both gradients, without the loss.

    The chunks are those of engine/kernels/vocab_loss.py.
    """
    bounds = tensors.rows.bounds
    per_chunk = tensors.rows.slots_per_chunk
    hidden_grads = []
    weight_grad_UD = torch.zeros_like(tensors.weight_UD)
    for chunk in range(len(bounds[0]) - 1):
        product(tensors.targets.hidden_ND[chunk * per_chunk : (chunk + 1) * per_chunk], tensors.teacher.weight_VD.mT)
        hidden_rD = torch.cat([tensors.hidden_RD[starts[chunk] : starts[chunk + 1]] for starts in bounds])
        logits_rU = product(hidden_rD, tensors.weight_UD.mT)
        hidden_grads.append(product(logits_rU, tensors.weight_UD))
        weight_grad_UD += product(logits_rU.mT, hidden_rD)
    return hidden_grads, weight_grad_UD


def parts(shape: LossShape) -> dict[str, StepPart]:
    sizes = shape.hidden_size, shape.draft_vocab_size
    return {"head": head_part(shape.num_rows, *sizes), "teacher": frozen_head_part(shape.num_slots, *sizes)}


def figures(shape: LossShape, seconds: float) -> dict[str, float]:
    return {"rows/s": shape.num_rows / seconds}


def _fused() -> Callable[..., VocabLoss]:
    from engine.kernels.row_loss import row_loss  # needs Triton

    return partial(vocab_loss, loss_pass=LossPass(row_loss))


BENCHMARK = Benchmark(
    module="benchmarks.kernels.bench_vocab_loss",
    shapes=_shapes(),
    default_shapes={"cpu": ("cpu-*",), "cuda": ("8b-*", "70b-*", "kimi-*")},
    providers={
        "reference": Provider(lambda: partial(_with_gradients, reference.vocab_loss)),
        "deferred": Provider(lambda: partial(_with_gradients, vocab_loss)),
        "fused": Provider(lambda: partial(_with_gradients, _fused()), devices=("cuda",)),
        "products": Provider(lambda: _products),
    },
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
