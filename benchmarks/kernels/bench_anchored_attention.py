"""Time the attention of draft blocks, forward and backward.

    python -m benchmarks.kernels.bench_anchored_attention --shapes '8b-*' --providers tiles triton

Run from the repository's root. A shape's name gives the model, the context tokens, the documents,
rows per block x blocks, and the sliding window if there is one. Anchors are drawn at random. Head
counts are those of Llama-3.1-8B, except in the shapes for a CPU. `reference` stores a matrix of all
rows and keys. TFLOP/s are counted as in flash-attention: two products per pair of row and key in the
forward pass and five in the backward pass.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Place, Provider, main
from benchmarks.kernels.attention_rate import tera_flops_per_s
from engine.kernels.interface import BlockRows
from engine.models.costs import StepPart, attention_part


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a micro-batch of draft blocks.

    window: tokens of the context that a row sees; None = all tokens before the anchor.
    heads: (H, G, E), numbers of query and key heads, and the head size.
    """

    num_tokens: int
    num_documents: int
    block_size: int
    num_blocks: int
    heads: tuple[int, int, int]
    window: int | None = None

    @property
    def num_rows(self) -> int:
        return self.block_size * self.num_blocks

    @cached_property
    def rows(self) -> BlockRows:
        """What every row sees, on the CPU."""
        generator = torch.Generator().manual_seed(0)
        anchor_N = torch.randperm(self.num_tokens - 1, generator=generator)[: self.num_blocks].sort().values + 1
        anchor_P = anchor_N.repeat_interleave(self.block_size)
        document_tokens = self.num_tokens // self.num_documents
        begin_P = anchor_P - anchor_P % document_tokens
        row_P = torch.arange(self.num_rows)
        own_begin_P = row_P - row_P % self.block_size
        if self.window is not None:
            begin_P = torch.maximum(begin_P, anchor_P - self.window + row_P - own_begin_P).minimum(anchor_P)
        return BlockRows(begin_P, anchor_P, own_begin_P, own_begin_P + self.block_size)

    @property
    def num_pairs(self) -> int:
        """Number of pairs of a row and a key that it attends to."""
        context_begin_Q, context_end_Q, own_begin_Q, own_end_Q = self.rows.bounds_4Q
        return (context_end_Q - context_begin_Q + own_end_Q - own_begin_Q).sum().item()


@dataclass(frozen=True)
class BlockTensors:
    """Arguments of an implementation. Gradients are computed for all leaves."""

    leaves: list[Tensor]
    rows: BlockRows


def _shapes() -> dict[str, BlockShape]:
    heads = (32, 8, 128)
    return {
        "8b-4096-one-16x512": BlockShape(4096, 1, 16, 512, heads),
        "8b-4096-many-16x512": BlockShape(4096, 8, 16, 512, heads),
        "8b-4096-one-16x512-window1024": BlockShape(4096, 1, 16, 512, heads, 1024),
        "8b-4096-one-8x64": BlockShape(4096, 1, 8, 64, heads),
        "cpu-1024-one-8x128": BlockShape(1024, 1, 8, 128, (8, 2, 64)),
        "cpu-1024-many-8x128": BlockShape(1024, 8, 8, 128, (8, 2, 64)),
    }


def prepare(shape: BlockShape, place: Place) -> BlockTensors:
    torch.manual_seed(0)
    num_heads, num_groups, head_dim = shape.heads

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=place.device, dtype=place.dtype).requires_grad_()

    leaves = [draw(shape.num_rows, num_heads, head_dim)]
    for num_keys in (shape.num_tokens, shape.num_tokens, shape.num_rows, shape.num_rows):
        leaves.append(draw(num_keys, num_groups, head_dim))
    rows = BlockRows(*shape.rows.bounds_4Q.to(place.device).unbind())
    return BlockTensors(leaves, rows)


def setup(attention: Callable[..., Tensor], tensors: BlockTensors) -> Callable[[], object]:
    direction_QHE = torch.randn_like(tensors.leaves[0])

    def forward_and_backward() -> object:
        output_QHE = attention(*tensors.leaves, tensors.rows)
        return torch.autograd.grad(output_QHE, tensors.leaves, direction_QHE)

    return forward_and_backward


def _attention(module: str) -> Callable[..., Tensor]:
    return importlib.import_module(f"engine.kernels.{module}").anchored_attention


def parts(shape: BlockShape) -> dict[str, StepPart]:
    num_keys = shape.num_tokens + shape.num_rows
    return {"attention": attention_part(shape.num_rows, num_keys, shape.num_pairs, shape.heads)}


def figures(shape: BlockShape, seconds: float) -> dict[str, float]:
    return {"TFLOP/s": tera_flops_per_s(shape.num_pairs, shape.heads, seconds)}


BENCHMARK = Benchmark(
    module="benchmarks.kernels.bench_anchored_attention",
    shapes=_shapes(),
    default_shapes={"cpu": ("cpu-*",), "cuda": ("8b-*",)},
    providers={
        "reference": Provider(partial(_attention, "reference")),
        "tiles": Provider(partial(_attention, "anchored_blocks")),
        "triton": Provider(partial(_attention, "anchored_attention"), devices=("cuda",)),
    },
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
