"""Time a target's forward over packed documents: in its precision, in fp8, and with Transformers.

    python -m benchmarks.bench_target --shapes 'llama3.1-8b-*' --json target.json

Run from the repository's root. A shape's name gives the model, whose config is in
tests/recipes_configs.py or a small one for a CPU, and the tokens per micro-batch. Documents have
2048 tokens, or 512 on a CPU, and their second half are assistant tokens. Weights are random and
created on the device. FLOPs are those of engine/planning.

- `packed`: the forward that training runs.
- `packed liger`: with norms, SwiGLU and rotary embeddings of liger-kernel, as in training where it
  is installed.
- `packed fp8`: with the decoder's linear maps and experts in fp8, one scale per block of 128 x 128,
  as in published checkpoints.
- `packed fp8 x fp8`: with their inputs quantised as well (`target.fp8_activations`).
- `transformers`: the model's forward with sdpa attention, one document at a time, with logits of
  the slots only and without auxiliary states.

Goals on an H200 at llama3.1-8b-32k: `packed` reaches half of the FLOP/s of a large product
(`of product`), and `packed fp8 x fp8` is at least 1.3 times as fast.
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
from engine.models.costs import Cost, StepPart
from engine.models.training_rows import allowed_rows, slots_of
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
    """A target, and a micro-batch of documents with random tokens."""

    config: PreTrainedConfig
    num_tokens: int
    document_tokens: int
    seed: int = 0

    @cached_property
    def batch(self) -> PackedBatch:
        """Packed documents of the micro-batch, on the host."""
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
        """Return the cost of the target in the precision that it has on a type of device."""
        return TargetCost(without_weights(self.config, TargetSection(), torch.device(device)), mesh)


def _shapes() -> dict[str, TargetShape]:
    published = {name: target_config(name) for name in ("llama3.1-8b", "qwen3-30b-a3b")}
    small = {"cpu": AutoConfig.for_model("llama", **SMALL), "cpu-moe": AutoConfig.for_model("qwen3_moe", **SMALL_MOE)}
    large = {f"{name}-{n}k": TargetShape(config, 1024 * n, 2048) for name, config in published.items() for n in (8, 32)}
    # Used by tests.
    tiny = {"cpu-tiny": TargetShape(AutoConfig.for_model("llama", **TINY), 128, 64)}
    return large | tiny | {f"{name}-2k": TargetShape(config, 2048, 512) for name, config in small.items()}


@dataclass(frozen=True)
class TargetTensors:
    """A causal LM and a micro-batch for it, on one device."""

    model: PreTrainedModel
    batch: PackedBatch
    slots_N: Tensor


def random_model(config: PreTrainedConfig, place: Place) -> PreTrainedModel:
    """Return a model with random weights, created on its device; the same weights in every call."""
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
    """Return a call of a copy of the model with liger-kernel's operations.

    The copy shares the model's weights, because other providers run the model unchanged.
    """
    operations = liger_operations()
    model = copy.deepcopy(tensors.model, {id(weight): weight for weight in tensors.model.parameters()})
    target = FrozenTarget(model, None)
    fuse_elementwise(target.decoder, target.dtype, target.device, operations)
    return lambda: target(tensors.batch, tensors.slots_N)


def in_fp8(model: PreTrainedModel, fp8_activations: bool = False) -> PreTrainedModel:
    """Return a copy of the model with its decoder's linear maps and experts in fp8.

    All other weights are shared with the given model.
    fp8_activations: whether the inputs of these maps are quantised as well.
    """
    weights = {id(weight): weight for weight in model.parameters()}
    for module in decoder_of(model).modules():
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3 or (weight.ndim == 2 and isinstance(module, nn.Linear)):
                weights[id(weight)] = nn.Parameter(quantised(weight, BLOCK if fp8_activations else None), requires_grad=False)
    return copy.deepcopy(model, weights)


def quantised(weight: Tensor, row_group: int | None = None) -> QuantisedWeight:
    """Quantise a weight [N, K], or [X, N, K] of experts, to fp8.

    Each block is scaled so that its largest magnitude becomes the largest fp8 value.
    """
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
    """Return the cost of a forward, with fp8 weights counted as half an element of 16 bits."""
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
