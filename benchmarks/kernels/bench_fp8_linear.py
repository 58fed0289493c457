"""Time the product of rows and fp8 weights in several ways, next to a dense product.

    python -m benchmarks.kernels.bench_fp8_linear --shapes 'deepseek-*' --providers dense fused

Run from the repository's root. A shape's name gives the model and weight, the number of experts,
and the total number of rows, which are distributed evenly over the experts. `fused` dequantises the
weight on the chip, `dequantised` dequantises it in memory first, `dense` is the product alone with
a weight that is not quantised, and `fp8 rows` quantises the rows as well.

Goals compared with `dense` in bf16: `fused` is at least 1.3 times as fast if few rows share a
weight, and `fp8 rows` is at least 1.3 times as fast if many do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Place, Provider, main
from engine.kernels import reference
from engine.models.costs import Cost, StepPart
from engine.weights.quantised_weight import QuantisedWeight

BLOCK = (128, 128)


@dataclass(frozen=True)
class LinearShape:
    num_experts: int
    num_rows: int
    num_outputs: int
    num_inputs: int


@dataclass(frozen=True)
class LinearTensors:
    """Arguments of `reference.fp8_linear`, and the weight dequantised to the rows' precision."""

    rows_MK: Tensor
    codes_XNK: Tensor
    scale_XGJ: Tensor
    ends_X: Tensor | None
    weight_XNK: Tensor


def _shapes() -> dict[str, LinearShape]:
    """Return shapes of DeepSeek-V3 and Qwen3-30B-A3B, and small ones for a CPU.

    Those of DeepSeek-V3 are the output map of attention and a sixteenth of the experts; those of
    Qwen3-30B-A3B are all experts.
    """
    sizes = {
        "deepseek-o": (1, 7168, 16384),
        "deepseek-up": (16, 4096, 7168),
        "deepseek-down": (16, 7168, 2048),
        "qwen3-up": (128, 1536, 2048),
        "cpu-map": (1, 1024, 1024),
        "cpu-experts": (8, 512, 512),
    }
    rows = {"deepseek": (16, 256, 8192), "qwen3": (1024, 65536), "cpu": (64, 1024)}
    return {
        f"{name}-{experts}-{num_rows}": LinearShape(experts, num_rows, outputs, inputs)
        for name, (experts, outputs, inputs) in sizes.items()
        for num_rows in rows[name.partition("-")[0]]
    }


def prepare(shape: LinearShape, place: Place) -> LinearTensors:
    torch.manual_seed(0)
    experts = shape.num_experts
    outputs = shape.num_outputs
    inputs = shape.num_inputs
    codes_XNK = torch.stack([torch.randn(outputs, inputs).to(torch.float8_e4m3fn) for _ in range(experts)]).to(place.device)
    scale_XGJ = torch.rand(experts, -(-outputs // BLOCK[0]), -(-inputs // BLOCK[1]), device=place.device) + 0.5
    weights = [reference.dequantised(*of_one, BLOCK, place.dtype) for of_one in zip(codes_XNK, scale_XGJ, strict=True)]
    ends_X = torch.arange(1, experts + 1, dtype=torch.int32, device=place.device) * shape.num_rows // experts
    rows_MK = torch.randn(shape.num_rows, inputs, device=place.device, dtype=place.dtype)
    return LinearTensors(rows_MK, codes_XNK, scale_XGJ, ends_X if experts > 1 else None, torch.stack(weights))


def setup(provider: Callable[[LinearTensors], object], tensors: LinearTensors) -> Callable[[], object]:
    return torch.no_grad()(partial(provider, tensors))


def _dense(tensors: LinearTensors) -> object:
    if tensors.ends_X is None:
        return F.linear(tensors.rows_MK, tensors.weight_XNK[0])
    return torch._grouped_mm(tensors.rows_MK, tensors.weight_XNK.mT, offs=tensors.ends_X)


def _dequantised(tensors: LinearTensors) -> object:
    rows_MK = tensors.rows_MK
    num_outputs = tensors.codes_XNK.shape[1]

    def weight_NK(expert: int) -> Tensor:
        return QuantisedWeight(tensors.codes_XNK[expert], tensors.scale_XGJ[expert], BLOCK, rows_MK.dtype).dequantised()

    return reference.grouped_linear(rows_MK, weight_NK, num_outputs, tensors.ends_X)


def parts(shape: LinearShape) -> dict[str, StepPart]:
    """Return the cost of the product, with fp8 weights counted as half an element of 16 bits."""
    weights = shape.num_outputs * shape.num_inputs
    elements = shape.num_rows * (shape.num_inputs + shape.num_outputs) + shape.num_experts * weights // 2
    return {"product": StepPart(Cost(2 * shape.num_rows * weights, elements))}


def figures(shape: LinearShape, seconds: float) -> dict[str, float]:
    return {"rows/s": shape.num_rows / seconds}


def _fused() -> Callable[[LinearTensors], object]:
    from engine.kernels.fp8_linear import fp8_linear  # needs Triton

    return lambda tensors: fp8_linear(tensors.rows_MK, tensors.codes_XNK, tensors.scale_XGJ, BLOCK, tensors.ends_X)


def _fp8_rows() -> Callable[[LinearTensors], object]:
    from engine.kernels.fp8_activations import fp8_activations  # needs Triton

    def product(tensors: LinearTensors) -> Tensor:
        weight = tensors.codes_XNK, tensors.scale_XGJ, BLOCK
        return fp8_activations(tensors.rows_MK, *weight, tensors.ends_X, group=BLOCK[1])

    return product


BENCHMARK = Benchmark(
    module="benchmarks.kernels.bench_fp8_linear",
    shapes=_shapes(),
    default_shapes={"cpu": ("cpu-*",), "cuda": ("deepseek-*", "qwen3-*")},
    providers={
        "dense": Provider(lambda: _dense),
        "dequantised": Provider(lambda: _dequantised),
        "fused": Provider(_fused, devices=("cuda",)),
        "fp8 rows": Provider(_fp8_rows, devices=("cuda",)),
    },
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
