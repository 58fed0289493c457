"""Time argmax and log-sum-exp of a target's head, next to the product alone.

    python -m benchmarks.kernels.bench_head_stats --shapes '8b-*' --providers reference fused

Run from the repository's root. A shape's name gives the model, the number of slots, and whether
logits are capped. `reference` is plain PyTorch, and `fused` reads the logits once. `head` is the
implementation that a run uses on this device. `product` only computes the logits, so the difference
to another provider is the time of that provider's passes over them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Place, Provider, main
from engine.kernels import reference
from engine.models.costs import StepPart, frozen_head_part
from engine.target.head import TargetHead

Stats = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head. soft_cap: bound of the logits; None if they are not capped."""

    num_slots: int
    hidden_size: int
    vocab_size: int
    soft_cap: float | None = None


@dataclass(frozen=True)
class HeadTensors:
    """Last hidden states, and the head that reads them."""

    hidden_ND: Tensor
    head: TargetHead


def _shapes() -> dict[str, HeadShape]:
    """Return shapes of Llama-3.1-8B, Gemma 2 9B (capped), Qwen3-30B-A3B, and two for a CPU."""
    sizes = {
        "8b": (4096, 128256, None),
        "gemma": (3584, 256000, 30.0),
        "qwen3": (2048, 151936, None),
        "cpu": (256, 16000, None),
        "cpu-capped": (256, 16000, 30.0),
    }
    counts = {"8b": (1024, 8192), "gemma": (1024,), "qwen3": (1024, 8192)}
    shapes = {}
    for name, size in sizes.items():
        for num_slots in counts.get(name, (256,)):
            shapes[f"{name}-{num_slots}"] = HeadShape(num_slots, *size)
    return shapes


def prepare(shape: HeadShape, place: Place) -> HeadTensors:
    torch.manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=place.device, dtype=place.dtype)

    weight_VD = draw(shape.vocab_size, shape.hidden_size) * (3 * shape.hidden_size**-0.5)
    head = TargetHead(weight_VD, soft_cap=shape.soft_cap)
    return HeadTensors(draw(shape.num_slots, shape.hidden_size), head)


def setup(provider: Callable[[HeadTensors], object], tensors: HeadTensors) -> Callable[[], object]:
    return torch.no_grad()(partial(provider, tensors))


def _over_chunks(stats: Stats, tensors: HeadTensors) -> object:
    """Compute `stats` of the logits in chunks of 1,024 slots x 65,536 tokens.

    These are the chunks of engine/target/head.py.
    """
    results = []
    for hidden_ND in tensors.hidden_ND.split(1024):
        for weight_VD in tensors.head.weight_VD.split(65536):
            logits_NV = TargetHead(weight_VD).product(hidden_ND)
            results.append(stats(logits_NV, tensors.head.transform))
    return results


def _fused() -> Callable[[HeadTensors], object]:
    from engine.kernels.head_stats import head_stats  # needs Triton

    return partial(_over_chunks, head_stats)


def _no_stats(logits_NV: Tensor, transform: object) -> tuple[Tensor, ...]:
    return ()


def parts(shape: HeadShape) -> dict[str, StepPart]:
    return {"head": frozen_head_part(shape.num_slots, shape.hidden_size, shape.vocab_size)}


def figures(shape: HeadShape, seconds: float) -> dict[str, float]:
    return {"slots/s": shape.num_slots / seconds}


BENCHMARK = Benchmark(
    module="benchmarks.kernels.bench_head_stats",
    shapes=_shapes(),
    default_shapes={"cpu": ("cpu-*",), "cuda": ("8b-*", "gemma-*", "qwen3-*")},
    providers={
        "reference": Provider(lambda: partial(_over_chunks, reference.head_stats)),
        "head": Provider(lambda: lambda tensors: tensors.head.argmax_and_lse(tensors.hidden_ND)),
        "fused": Provider(_fused, devices=("cuda",)),
        "product": Provider(lambda: partial(_over_chunks, _no_stats)),
    },
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
