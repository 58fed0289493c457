"""A target's forward of packed documents: as it is, with weights in fp8, and Transformers' own of one document after the other.

    python -m benchmarks.bench_target --shapes 'llama3.1-8b-*' --json target.json

Run from the repository's root. A shape's name says whose config, from tests/recipes_configs.py or a small one for a CPU, and
how many tokens the micro-batch has: documents of 2048, on a CPU of 512, of which the assistant says the second half. Weights
are random and made on the device. `packed` and the two in fp8 are what training calls: `packed fp8` keeps the decoder's linear
maps and experts in fp8 with a scale for each block of 128 x 128, as published checkpoints have it, and `packed fp8 x fp8`
quantises what they are multiplied with as well (`target.fp8_activations`). `packed liger` is `packed` with norms, SwiGLU and
rotary embeddings of liger-kernel, as training has them where it is installed. `transformers`: the model's forward with its sdpa
attention and logits of the slots alone; it keeps no auxiliary states. FLOPs are those of engine/planning.

Asked of an H200, at llama3.1-8b-32k: `packed` does half of the FLOP/s that a large product does (`of product`), and
`packed fp8 x fp8` is at least 1.3 times as fast.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from benchmarks.harness import Benchmark, Place, Provider, main
from engine.batch import PackedBatch
from engine.config.sections import TargetSection, TttSection
from engine.models.eagle3.flops import Cost, StepPart
from engine.models.eagle3.training_rows import allowed_rows, slots_of
from engine.parallel.mesh import ALONE, TargetMesh
from engine.planning.job import DocumentSizes
from engine.planning.target_cost import Forward, TargetCost
from engine.target.frozen import FrozenTarget
from engine.target.fused_elementwise import fuse_elementwise, liger_operations
from engine.target.structure import auto_class, decoder_of, without_weights
from engine.weights.quantised_weight import QuantisedWeight
from tests.recipes_configs import target_config

BLOCK = 128
SAID = 0.5
SMALL = dict(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1792,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
)
TINY = SMALL | dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=7, head_dim=16)
SMALL_MOE = SMALL | dict(moe_intermediate_size=448, num_experts=16, num_experts_per_tok=4)


@dataclass(frozen=True, eq=False)
class TargetShape:
    """A target, and the documents of a micro-batch for it, of random tokens."""

    config: PreTrainedConfig
    num_tokens: int
    document_tokens: int
    seed: int = 0

    @cached_property
    def batch(self) -> PackedBatch:
        """On the host."""
        generator = torch.Generator().manual_seed(self.seed)
        ids_T = torch.randint(self.config.vocab_size, (self.num_tokens,), generator=generator)
        return replace(DocumentSizes(self.document_tokens, SAID).batch(self.num_tokens), input_ids_T=ids_T)

    @cached_property
    def slots_N(self) -> Tensor:
        return slots_of(allowed_rows(self.batch, TttSection()))

    @property
    def forward(self) -> Forward:
        return Forward(self.num_tokens, len(self.slots_N), int((self.batch.position_T + 1).sum()))

    def cost(self, mesh: TargetMesh = ALONE, device: str = "cpu") -> TargetCost:
        """Of the target in the precision that it has on a type of device."""
        return TargetCost(without_weights(self.config, TargetSection(), torch.device(device)), mesh)


def _shapes() -> dict[str, TargetShape]:
    published = {name: target_config(name) for name in ("llama3.1-8b", "qwen3-30b-a3b")}
    small = {"cpu": AutoConfig.for_model("llama", **SMALL), "cpu-moe": AutoConfig.for_model("qwen3_moe", **SMALL_MOE)}
    large = {f"{name}-{n}k": TargetShape(config, 1024 * n, 2048) for name, config in published.items() for n in (8, 32)}
    tiny = {"cpu-tiny": TargetShape(AutoConfig.for_model("llama", **TINY), 128, 64)}  # for tests of what uses this
    return large | tiny | {f"{name}-2k": TargetShape(config, 2048, 512) for name, config in small.items()}


@dataclass(frozen=True)
class TargetTensors:
    """A causal LM with the micro-batch that it is to run, all on one device."""

    model: PreTrainedModel
    batch: PackedBatch
    slots_N: Tensor


def random_model(config: PreTrainedConfig, place: Place) -> PreTrainedModel:
    """The same weights at every call, made where they are used."""
    torch.manual_seed(0)
    with place.device:
        return auto_class(config).from_config(config, dtype=place.dtype).eval().requires_grad_(False)


def prepare(shape: TargetShape, place: Place) -> TargetTensors:
    return TargetTensors(random_model(shape.config, place), shape.batch.to(place.device), shape.slots_N.to(place.device))


def setup(provider: Callable[[TargetTensors], Callable[[], object]], tensors: TargetTensors) -> Callable[[], object]:
    return provider(tensors)


def _packed(tensors: TargetTensors) -> Callable[[], object]:
    target = FrozenTarget(tensors.model, None)
    return lambda: target(tensors.batch, tensors.slots_N)


def _packed_fp8(tensors: TargetTensors) -> Callable[[], object]:
    return _packed(replace(tensors, model=in_fp8(tensors.model)))


def _packed_fp8_by_fp8(tensors: TargetTensors) -> Callable[[], object]:
    return _packed(replace(tensors, model=in_fp8(tensors.model, fp8_activations=True)))


def _packed_liger(tensors: TargetTensors) -> Callable[[], object]:
    """Run a copy of the model that shares its weights, for others run the model as it is."""
    operations = liger_operations()
    model = copy.deepcopy(tensors.model, {id(weight): weight for weight in tensors.model.parameters()})
    target = FrozenTarget(model, None)
    fuse_elementwise(target.decoder, target.dtype, target.device, operations)
    return lambda: target(tensors.batch, tensors.slots_N)


def in_fp8(model: PreTrainedModel, fp8_activations: bool = False) -> PreTrainedModel:
    """The model with its decoder's linear maps and experts in fp8; all other weights are those of the given one.

    fp8_activations: whether what they are multiplied with is to be quantised as well.
    """
    weights = {id(weight): weight for weight in model.parameters()}
    for module in decoder_of(model).modules():
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3 or (weight.ndim == 2 and isinstance(module, nn.Linear)):
                weights[id(weight)] = nn.Parameter(quantised(weight, BLOCK if fp8_activations else None), requires_grad=False)
    return copy.deepcopy(model, weights)


def quantised(weight: Tensor, row_group: int | None = None) -> QuantisedWeight:
    """[N, K], or [X, N, K] of experts, each block scaled so that its largest value is the largest of fp8."""
    largest = F.max_pool2d(weight.abs().float().view(-1, *weight.shape[-2:]), BLOCK, ceil_mode=True)
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).view(*weight.shape[:-2], *largest.shape[-2:])
    by_value = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., : weight.shape[-2], : weight.shape[-1]]
    codes = (weight.float() / by_value).to(torch.float8_e4m3fn)
    block = (1,) * (weight.ndim - 2) + (BLOCK, BLOCK)
    return QuantisedWeight(codes, scale, block, weight.dtype, row_group=row_group)


def _transformers(tensors: TargetTensors) -> Callable[[], object]:
    lengths = tensors.batch.host_lengths
    ids, positions = (x.split(lengths) for x in (tensors.batch.input_ids_T, torch.arange(sum(lengths))))
    slots = [tensors.slots_N[(tensors.slots_N >= own[0]) & (tensors.slots_N <= own[-1])] - own[0] for own in positions]

    @torch.no_grad()
    def run() -> None:
        for ids_L, slots_M in zip(ids, slots, strict=True):
            tensors.model(input_ids=ids_L[None], use_cache=False, logits_to_keep=slots_M)

    return run


@cache
def parts(shape: TargetShape) -> dict[str, StepPart]:
    """With weights of half an element: a byte, at half precision."""
    cost = shape.cost()
    forward = shape.forward
    width = shape.config.hidden_size
    weights = round(cost.num_active_weights) + width * shape.config.vocab_size
    written = (3 * forward.num_tokens + forward.num_slots) * width
    return {"forward": StepPart(Cost(round(cost.flops(forward)), weights // 2 + written))}


def figures(shape: TargetShape, seconds: float) -> dict[str, float]:
    return {"tokens/s": shape.num_tokens / seconds}


BENCHMARK = Benchmark(
    module="benchmarks.bench_target",
    shapes=_shapes(),
    default_shapes={"cpu": ("cpu-*2k",), "cuda": ("llama3.1-8b-*", "qwen3-30b-a3b-*")},
    providers={
        "packed": Provider(lambda: _packed),
        "packed liger": Provider(lambda: _packed_liger, devices=("cuda",)),
        "packed fp8": Provider(lambda: _packed_fp8),
        "packed fp8 x fp8": Provider(lambda: _packed_fp8_by_fp8),
        "transformers": Provider(lambda: _transformers),
    },
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
