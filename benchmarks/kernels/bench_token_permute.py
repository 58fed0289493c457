"""Time the permutation of token rows into expert order and their weighted sum back per token.

    python -m benchmarks.kernels.bench_token_permute --shapes 'qwen3-*' --providers transformers fused

Run from the repository's root. A shape's name gives the model, with its hidden size and number of
experts per token, and the number of tokens. `fused` uses two kernel launches, `plain` is plain
PyTorch, and `transformers` does the same as Transformers. There is no product between the two
steps, so only memory traffic is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Place, Provider, main
from engine.kernels import TokenPermute
from engine.models.costs import Cost, StepPart


@dataclass(frozen=True)
class PermuteShape:
    num_tokens: int
    num_choices: int
    hidden_size: int


@dataclass(frozen=True)
class PermuteTensors:
    """Rows of tokens, the order of their expert choices, its inverse, and the choices' weights."""

    rows_TD: Tensor
    order_M: Tensor
    place_TK: Tensor
    weight_TK: Tensor


def _shapes() -> dict[str, PermuteShape]:
    """Return shapes of Qwen3-30B-A3B and DeepSeek-V3, and a small one for a CPU."""
    sizes = {"qwen3": (8, 2048), "deepseek": (8, 7168), "cpu": (4, 512)}
    tokens = {"qwen3": (8192, 32768), "deepseek": (4096, 16384), "cpu": (1024,)}
    return {
        f"{name}-{num_tokens}": PermuteShape(num_tokens, *size) for name, size in sizes.items() for num_tokens in tokens[name]
    }


def prepare(shape: PermuteShape, place: Place) -> PermuteTensors:
    torch.manual_seed(0)
    order_M = torch.randperm(shape.num_tokens * shape.num_choices)
    place_TK = order_M.argsort().view(shape.num_tokens, shape.num_choices)
    rows_TD = torch.randn(shape.num_tokens, shape.hidden_size, device=place.device, dtype=place.dtype)
    weight_TK = torch.rand(shape.num_tokens, shape.num_choices, device=place.device)
    return PermuteTensors(rows_TD, order_M.to(place.device), place_TK.to(place.device), weight_TK)


def setup(provider: Callable[[PermuteTensors], object], tensors: PermuteTensors) -> Callable[[], object]:
    return torch.no_grad()(partial(provider, tensors))


def _in_two_steps(permute: TokenPermute, tensors: PermuteTensors) -> Tensor:
    rows_TD = tensors.rows_TD
    num_choices = tensors.place_TK.shape[1]
    sorted_MD = rows_TD.new_empty(len(tensors.order_M), rows_TD.shape[1])
    permute.permute_rows(rows_TD, tensors.order_M // num_choices, sorted_MD)
    return permute.unpermute_rows(sorted_MD, tensors.place_TK, torch.empty_like(rows_TD), tensors.weight_TK)


def _transformers(tensors: PermuteTensors) -> Tensor:
    """Run the operations around the products of Transformers' `grouped_mm_experts_forward`."""
    rows_TD = tensors.rows_TD
    num_choices = tensors.place_TK.shape[1]
    sorted_MD = rows_TD[tensors.order_M // num_choices]
    weighted_MD = sorted_MD * tensors.weight_TK.flatten()[tensors.order_M].to(rows_TD.dtype)[:, None]
    by_token_MD = weighted_MD[tensors.place_TK.flatten()]
    return by_token_MD.view(len(rows_TD), num_choices, -1).sum(1).to(rows_TD.dtype)


def parts(shape: PermuteShape) -> dict[str, StepPart]:
    """Return the cost: the permutation reads and writes every row once; the sum reads it once."""
    rows = shape.num_tokens * shape.num_choices
    values = shape.hidden_size * (3 * rows + shape.num_tokens)
    return {"rows": StepPart(Cost(2 * rows * shape.hidden_size, values))}


def figures(shape: PermuteShape, seconds: float) -> dict[str, float]:
    return {"tokens/s": shape.num_tokens / seconds}


def _fused() -> Callable[[PermuteTensors], object]:
    from engine.kernels import token_permute  # needs Triton

    fused = TokenPermute(token_permute.permute_rows, token_permute.quantise_rows, token_permute.unpermute_rows)
    return partial(_in_two_steps, fused)


BENCHMARK = Benchmark(
    module="benchmarks.kernels.bench_token_permute",
    shapes=_shapes(),
    default_shapes={"cpu": ("cpu-*",), "cuda": ("qwen3-*", "deepseek-*")},
    providers={
        "transformers": Provider(lambda: _transformers),
        "plain": Provider(lambda: partial(_in_two_steps, TokenPermute())),
        "fused": Provider(_fused, devices=("cuda",)),
    },
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
