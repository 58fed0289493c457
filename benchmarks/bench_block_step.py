"""Time one training step of a block drafter: the target's head where the loss needs it, the forward and the backward.

    python -m benchmarks.bench_block_step --shapes 'dflash-qwen3-8b-4096-*' --json step.json

Run from the repository's root. A shape's name gives the method, the target, the tokens per
micro-batch, and the share of assistant tokens. A micro-batch consists of documents of 1024 tokens or
one shorter document, with turns of 128 tokens that end with their assistant tokens. Anchors are drawn
as in a run. The draft of Qwen3-8B is that of launcher/recipes; with few tokens it fits on a CPU.
Weights and hidden states are random. The target's decoder and the optimizer do not run.

A provider computes the same loss and gradients without one of the optimisations, or recomputes
activations. `every row` computes the last layer for rows without loss too, and keys and values of
all context tokens. All are compared with the same floor, which counts only the rows that a loss
depends on, and each different row of the first layer once. MFU counts the same FLOPs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Qwen3Config

from benchmarks.block_forward import BlockInputs, make_forward
from benchmarks.harness import Benchmark, Place, Provider, main
from engine.batch import PackedBatch
from engine.config.recipe import load_config
from engine.kernels import Kernels, choose_kernels
from engine.models.block_drafter.backbone import BlockDraft, BlockLayer, LayerInputs, spread
from engine.models.block_drafter.block_config import BlockConfig
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.block_drafter.block_rows import BlockPlan
from engine.models.costs import StepPart
from engine.models.method_registry import make_method
from engine.target.head import TargetHead
from tests.recipes_configs import target_config

RECIPES = Path(__file__).resolve().parents[1] / "launcher" / "recipes"
METHODS = ("dflash", "dspark", "dflash2")
SHARES = (1.0, 0.5, 0.3)
DOCUMENT_TOKENS = 1024
TURN_TOKENS = 128
QWEN3_8B = "qwen3-8b"
QWEN3_8B_TOKENS = 4096
QWEN3_8B_ANCHORS = 512  # of as many tokens, as in the recipes
QWEN3_8B_TOKENS_ON_A_CPU = 128
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 512}
ON_A_CPU = {"cpu": SMALL, "cpu-tiny": TINY}  # cpu-tiny is used by tests


@dataclass(frozen=True)
class Variant:
    """What a provider changes in the computation of a step.

    options: recipe options that it changes, by dotted key.
    projects_mask_rows_once: whether the first layer projects the mask rows once, as in a run.
    leaves_out_rows: whether rows that no loss depends on are left out of the last layer, as in a run.
    """

    options: dict[str, str] = field(default_factory=dict)
    projects_mask_rows_once: bool = True
    leaves_out_rows: bool = True


VARIANTS = {
    "as in a run": Variant(),
    "every row": Variant({"ttt.compaction": "false"}, leaves_out_rows=False),
    "every mask row": Variant(projects_mask_rows_once=False),
    "recompute mlp": Variant({"block.recompute": "mlp"}),
    "recompute layer": Variant({"block.recompute": "layer"}),
}


@dataclass(frozen=True)
class BlockStepShape:
    """A block drafter and a micro-batch for it.

    model: QWEN3_8B or a key of `ON_A_CPU`. anchors: blocks per `num_tokens`; fewer where few tokens may be anchors.
    assistant: share of each turn's tokens that carry loss; they are its last tokens.
    """

    draft_method: str
    model: str
    num_tokens: int
    anchors: int
    assistant: float

    def method(self, options: dict[str, str]) -> BlockMethod:
        """Return the method of the shape's recipe, with further options."""
        if self.model == QWEN3_8B:
            recipe = RECIPES / f"{QWEN3_8B}-{self.draft_method}.yaml"
            chosen = {}
        else:
            recipe = None
            chosen = self._small_recipe()
        chosen |= {"block.anchors": self.anchors, "data.max_tokens": self.num_tokens} | options
        method = make_method(load_config(recipe, [f"{key}={value}" for key, value in chosen.items()]))
        assert isinstance(method, BlockMethod)
        return method

    def _small_recipe(self) -> dict[str, Any]:
        """Return the options of a draft for one of the targets of `ON_A_CPU`, by dotted key."""
        return {
            "draft.method": self.draft_method,
            "draft.num_layers": 3,
            "block.mask_token_id": ON_A_CPU[self.model]["vocab_size"] - 1,
            "block.size": 7 if self.draft_method == "dspark" else 8,
        }

    @property
    def target(self) -> PreTrainedConfig:
        """The config of the target."""
        return target_config(QWEN3_8B) if self.model == QWEN3_8B else Qwen3Config(**ON_A_CPU[self.model])

    @cached_property
    def draft(self) -> BlockConfig:
        """The draft's config, with as many auxiliary layers as the method takes by default."""
        method = self.method({})
        target = self.target
        config = method.derive_config(target, method.choose_aux_layers(target, None))
        assert isinstance(config, BlockConfig)
        return config

    @cached_property
    def batch(self) -> PackedBatch:
        """The micro-batch on the CPU."""
        generator = torch.Generator().manual_seed(0)
        position_T = torch.arange(self.num_tokens)
        document_tokens = min(DOCUMENT_TOKENS, self.num_tokens)
        first = TURN_TOKENS - round(TURN_TOKENS * self.assistant)
        cu_seqlens = torch.arange(0, self.num_tokens + 1, document_tokens, dtype=torch.int32)
        input_ids_T = torch.randint(self.draft.mask_token_id, (self.num_tokens,), generator=generator)
        return PackedBatch(input_ids_T, position_T % TURN_TOKENS >= first, cu_seqlens)


def _shapes() -> dict[str, BlockStepShape]:
    sizes = [("cpu-tiny", 128, 16), ("cpu", 1024, 128)]
    for num_tokens in (QWEN3_8B_TOKENS, QWEN3_8B_TOKENS_ON_A_CPU):
        sizes.append((QWEN3_8B, num_tokens, QWEN3_8B_ANCHORS * num_tokens // QWEN3_8B_TOKENS))
    shapes = {}
    for draft_method in METHODS:
        for model, num_tokens, anchors in sizes:
            for share in SHARES:
                name = f"{draft_method}-{model}-{num_tokens}-{share}"
                shapes[name] = BlockStepShape(draft_method, model, num_tokens, anchors, share)
    return shapes


@dataclass(frozen=True)
class StepTensors:
    """A draft's configuration, a target's head and hidden states, and a micro-batch, on the device."""

    shape: BlockStepShape
    place: Place
    head: TargetHead
    batch: PackedBatch
    aux_TA: Tensor
    last_hidden_TD: Tensor
    embed_TD: Tensor
    mask_embed_D: Tensor


def prepare(shape: BlockStepShape, place: Place) -> StepTensors:
    """Create all tensors on the device, so that large weights are never copied from the CPU."""
    torch.manual_seed(0)
    config = shape.draft
    size = config.hidden_size
    with place.device:
        head_VD = torch.randn(config.vocab_size, size, dtype=place.dtype) * (4 * size**-0.5)
        return StepTensors(
            shape=shape,
            place=place,
            head=TargetHead(head_VD),
            batch=shape.batch.to(place.device),
            aux_TA=torch.randn(shape.num_tokens, len(config.aux_layers) * size, dtype=place.dtype),
            last_hidden_TD=torch.randn(shape.num_tokens, size, dtype=place.dtype),
            embed_TD=torch.randn(shape.num_tokens, size, dtype=place.dtype),
            mask_embed_D=torch.randn(size, dtype=place.dtype),
        )


def setup(variant: Variant, tensors: StepTensors) -> Callable[[], object]:
    draft, step = make_step(variant, tensors)

    def timed_step() -> None:
        step().backward()
        draft.zero_grad()

    return timed_step


def make_step(variant: Variant, tensors: StepTensors) -> tuple[BlockDraft, Callable[[], Tensor]]:
    """Return a draft with random weights, and the forward pass of its step, which returns the loss."""
    shape = tensors.shape
    method = shape.method(variant.options)
    draft = _random_draft(method, tensors)
    if not variant.projects_mask_rows_once:
        draft.first_inputs = partial(_project_every_row, draft)
    if not variant.leaves_out_rows:
        draft.last_layer_rows = _every_row
    inputs = BlockInputs(
        batch=tensors.batch,
        allowed_ST=method.allowed_rows(shape.batch).to(tensors.place.device),
        aux_TA=tensors.aux_TA,
        last_hidden_TD=tensors.last_hidden_TD,
        embed=lambda: tensors.embed_TD,
    )
    forward = make_forward(draft, method, tensors.head, inputs)
    return draft, lambda: forward().loss


def _random_draft(method: BlockMethod, tensors: StepTensors) -> BlockDraft:
    place = tensors.place
    config = tensors.shape.draft
    kernels = choose_kernels("auto", place.device, place.dtype, config.head_dim, Kernels(recompute=method.recompute))
    torch.manual_seed(1)
    with place.device:
        draft = method.draft_type(config, kernels).to(place.dtype)
        draft.draw_weights()
    draft.mask_embed_D = tensors.mask_embed_D
    return draft


def _project_every_row(draft: BlockDraft, layer: BlockLayer, anchor_embed_ND: Tensor, plan: BlockPlan) -> LayerInputs:
    """Return what `first_inputs` returns, but project every row, as the other layers do."""
    distinct_MD = torch.cat((anchor_embed_ND, draft.mask_embed_D[None]))
    return draft.inputs(layer, spread(distinct_MD, plan), plan)


def _every_row(plan: BlockPlan) -> Tensor:
    """Return the rows that `last_layer_rows` returns if none is left out."""
    return torch.arange(plan.num_rows, device=plan.block_P.device)


def parts(shape: BlockStepShape) -> dict[str, StepPart]:
    method = shape.method({})
    counts = method.count_work(shape.batch, method.allowed_rows(shape.batch))
    return method.step_parts(shape.draft, counts)


def figures(shape: BlockStepShape, seconds: float) -> dict[str, float]:
    return {"tokens/s": shape.num_tokens / seconds}


BENCHMARK = Benchmark(
    module="benchmarks.bench_block_step",
    shapes=_shapes(),
    default_shapes={"cpu": ("*-cpu-1024-*",), "cuda": (f"*-{QWEN3_8B}-{QWEN3_8B_TOKENS}-*",)},
    providers={name: Provider(lambda variant=variant: variant) for name, variant in VARIANTS.items()},
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
