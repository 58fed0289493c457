"""Time the loss of rows against tokens and target distributions, with its gradients, next to the products alone.

    python -m benchmarks.kernels.bench_token_loss --shapes '8b-*'

Run from the repository's root. A shape's name gives the model, the number of rows, and the loss:
`hard` = cross-entropy against tokens, `soft` = all parts against target distributions, `bias` =
cross-entropy with a trained bias of low rank. `reference` is plain PyTorch. `chunks` and `triton`
compute the loss in chunks, `triton` with a fused kernel. `products` runs only the matrix products of
`chunks`: a measured floor next to the computed one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Place, Provider, main
from engine.config.sections import CHUNK_MB
from engine.kernels import reference
from engine.kernels.interface import FrozenHead, LogitBias, SlotDistributions, TokenLoss, TokenRows, TokenTerms
from engine.kernels.matmul import product
from engine.kernels.token_loss import TokenPass, token_loss
from engine.models.costs import Cost, StepPart, frozen_head_part

TERMS = {"hard": TokenTerms(), "soft": TokenTerms(0.1, 0.2, 0.9), "bias": TokenTerms()}


@dataclass(frozen=True)
class TokenShape:
    """Sizes of a loss. num_slots: distinct slots of the rows. kind: key of `TERMS`. rank: of the bias."""

    num_rows: int
    num_slots: int
    hidden_size: int
    vocab_size: int
    kind: str
    rank: int


@dataclass(frozen=True)
class TokenTensors:
    """Arguments of the loss. Gradients are computed for the leaves: hidden states, and tensors of a bias."""

    leaves: list[Tensor]
    head: FrozenHead
    rows: TokenRows
    terms: TokenTerms
    targets: SlotDistributions | None
    token_pass: TokenPass

    @property
    def bias(self) -> LogitBias | None:
        _, *of_bias = self.leaves
        return LogitBias(*of_bias) if of_bias else None


def _shapes() -> dict[str, TokenShape]:
    """Return shapes of Llama-3.1-8B, and small ones for a CPU."""
    sizes = {"8b": (8192, 4096, 4096, 128256, 256), "cpu": (896, 600, 512, 32000, 64)}
    shapes = {}
    for name, (num_rows, num_slots, hidden_size, vocab_size, rank) in sizes.items():
        for kind in TERMS:
            shapes[f"{name}-{num_rows}-{kind}"] = TokenShape(num_rows, num_slots, hidden_size, vocab_size, kind, rank)
    return shapes


def prepare(shape: TokenShape, place: Place) -> TokenTensors:
    torch.manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*sizes, device=place.device, dtype=place.dtype) * scale

    weight_VD = draw(shape.vocab_size, shape.hidden_size, scale=3 * shape.hidden_size**-0.5)
    slot_R = torch.arange(shape.num_rows) * shape.num_slots // shape.num_rows
    label_R = torch.randint(shape.vocab_size, (shape.num_rows,), device=place.device)
    leaves = [draw(shape.num_rows, shape.hidden_size)]
    targets = None
    if shape.kind == "soft":
        target_ND = draw(shape.num_slots, shape.hidden_size)
        targets = SlotDistributions(target_ND, lambda hidden_nD: product(hidden_nD, weight_VD.mT).float())
    if shape.kind == "bias":
        leaves += [draw(shape.num_rows, shape.rank), draw(shape.vocab_size, shape.rank, scale=0.1)]

    def weigh(cross_entropy_R: Tensor) -> Tensor:
        return torch.full_like(cross_entropy_R, 1 / shape.num_rows)

    rows = TokenRows(label_R, slot_R.to(place.device), weigh, has_fixed_weights=True, host_slot_R=slot_R)
    token_pass = TokenPass(chunk_bytes=CHUNK_MB[place.device.type] << 20)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return TokenTensors(leaves, FrozenHead(weight_VD), rows, TERMS[shape.kind], targets, token_pass)


def setup(provider: Callable[[TokenTensors], object], tensors: TokenTensors) -> Callable[[], object]:
    return partial(provider, tensors)


def _with_gradients(loss: Callable[..., TokenLoss], tensors: TokenTensors, token_pass: TokenPass | None = None) -> object:
    arguments = tensors.leaves[0], tensors.head, tensors.rows, tensors.terms, tensors.targets, tensors.bias
    result = loss(*arguments, token_pass or tensors.token_pass)
    return torch.autograd.grad(result.total, tensors.leaves)


def _fused() -> Callable[[TokenTensors], object]:
    from engine.kernels.token_row_loss import token_row_loss  # needs Triton

    def run(tensors: TokenTensors) -> object:
        token_pass = TokenPass(token_row_loss, tensors.token_pass.chunk_bytes)
        return _with_gradients(token_loss, tensors, token_pass)

    return run


def _products_only(tensors: TokenTensors) -> object:
    """Compute the loss in its chunks, with nothing between the products."""

    def no_loss(chunk, with_gradients: bool) -> Tensor:
        return torch.zeros(4, len(chunk.logits_rV), device=chunk.logits_rV.device)

    return _with_gradients(token_loss, tensors, TokenPass(no_loss, tensors.token_pass.chunk_bytes))


def parts(shape: TokenShape) -> dict[str, StepPart]:
    sizes = shape.hidden_size, shape.vocab_size
    # The head is frozen: the backward pass computes the gradient of its inputs alone.
    once = frozen_head_part(shape.num_rows, *sizes).forward
    found = {"head": StepPart(once, once)}
    if shape.kind == "soft":
        found["target"] = frozen_head_part(shape.num_slots, *sizes)
    if shape.kind == "bias":
        flops = 2 * shape.num_rows * shape.rank * shape.vocab_size
        elements = (shape.num_rows + shape.vocab_size) * shape.rank
        found["bias"] = StepPart(Cost(flops, elements), Cost(2 * flops, elements))
    return found


def figures(shape: TokenShape, seconds: float) -> dict[str, float]:
    return {"rows/s": shape.num_rows / seconds}


BENCHMARK = Benchmark(
    module="benchmarks.kernels.bench_token_loss",
    shapes=_shapes(),
    default_shapes={"cpu": ("cpu-*",), "cuda": ("8b-*",)},
    providers={
        "reference": Provider(lambda: partial(_with_gradients, reference.token_loss)),
        "chunks": Provider(lambda: partial(_with_gradients, token_loss)),
        "triton": Provider(_fused, devices=("cuda",)),
        "products": Provider(lambda: _products_only),
    },
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
