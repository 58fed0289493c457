"""Time ancestor attention, forward and backward, next to causal attention with the same FLOPs.

    python -m benchmarks.kernels.bench_ancestor_attention --shapes '32k-*' --providers triton sdpa

Run from the repository's root. A shape's name gives the tokens, the documents, the ancestors per
row, and the share of rows that are kept, which are the last ones of each document. Head counts are
those of Llama-3.1-8B, except in the shapes for a CPU. `sdpa` is PyTorch's attention over one causal
document with the same number of pairs of row and key. TFLOP/s are counted as in flash-attention:
two products per pair in the forward pass and five in the backward pass.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Benchmark, Place, Provider, main
from benchmarks.kernels.attention_rate import tera_flops_per_s
from engine.kernels.interface import AttentionRows
from engine.models.costs import StepPart, attention_part


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of a micro-batch for ancestor attention.

    num_ancestors: ancestors per row.
    kept: share of a document's positions that have a row; they are its last positions.
    heads: (H, G, E), numbers of query and key heads, and the head size.
    """

    num_tokens: int
    num_documents: int
    num_ancestors: int
    kept: float
    heads: tuple[int, int, int]

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.arange(self.num_documents + 1, dtype=torch.int32) * self.num_tokens // self.num_documents

    @property
    def position_Q(self) -> Tensor:
        bounds = self.cu_seqlens.tolist()
        spans = zip(bounds[:-1], bounds[1:], strict=True)
        return torch.cat([torch.arange(end - round(self.kept * (end - start)), end) for start, end in spans])

    @property
    def num_pairs(self) -> int:
        """Number of pairs of a row and a key that it attends to."""
        rows = AttentionRows(self.position_Q, self.cu_seqlens)
        return (rows.position_Q - rows.start_Q + 1 + self.num_ancestors).sum().item()


@dataclass(frozen=True)
class AttentionTensors:
    """Arguments of an implementation, with their place and shape.

    Gradients are computed for all tensors except the rows.
    """

    place: Place
    shape: AttentionShape
    query_QHE: Tensor
    key_TGE: Tensor
    value_TGE: Tensor
    extra_keys: list[Tensor]
    extra_values: list[Tensor]
    rows: AttentionRows

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query_QHE, self.key_TGE, self.value_TGE, *self.extra_keys, *self.extra_values]


def _shapes() -> dict[str, AttentionShape]:
    sizes = {f"{thousands}k": (1024 * thousands, (32, 8, 128), 1024) for thousands in (1, 4, 16, 32, 128)}
    sizes["cpu"] = (512, (8, 2, 64), 128)
    return {
        f"{name}-{documents}-a{num_ancestors}-kept{kept}": AttentionShape(num_tokens, num_documents, num_ancestors, kept, heads)
        for name, (num_tokens, heads, document_tokens) in sizes.items()
        for documents, num_documents in (("one", 1), ("many", max(4, num_tokens // document_tokens)))
        for num_ancestors in (0, 1, 6)
        for kept in (1.0, 0.1)
    }


def prepare(shape: AttentionShape, place: Place) -> AttentionTensors:
    torch.manual_seed(0)
    position_Q, (num_heads, num_groups, head_dim) = shape.position_Q.to(place.device), shape.heads
    num_rows = position_Q.numel()

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=place.device, dtype=place.dtype).requires_grad_()

    extras = [[draw(num_rows, num_groups, head_dim) for _ in range(shape.num_ancestors)] for _ in range(2)]
    ancestors = tuple(torch.arange(num_rows, device=place.device) for _ in range(shape.num_ancestors))
    return AttentionTensors(
        place,
        shape,
        draw(num_rows, num_heads, head_dim),
        draw(shape.num_tokens, num_groups, head_dim),
        draw(shape.num_tokens, num_groups, head_dim),
        *extras,
        AttentionRows(position_Q, shape.cu_seqlens.to(place.device), ancestors),
    )


def setup(make: Callable[[AttentionTensors], Callable[[], object]], tensors: AttentionTensors) -> Callable[[], object]:
    return make(tensors)


def _ancestor_attention(module: str) -> Callable[[AttentionTensors], Callable[[], object]]:
    attention = importlib.import_module(f"engine.kernels.{module}").ancestor_attention

    def make(tensors: AttentionTensors) -> Callable[[], object]:
        direction_QHE = torch.randn_like(tensors.query_QHE)

        def forward_and_backward() -> object:
            output_QHE, _ = attention(*tensors.leaves[:3], tensors.extra_keys, tensors.extra_values, tensors.rows)
            return torch.autograd.grad(output_QHE, tensors.leaves, direction_QHE)

        return forward_and_backward

    return make


def _plain_causal() -> Callable[[AttentionTensors], Callable[[], object]]:
    def make(tensors: AttentionTensors) -> Callable[[], object]:
        (num_heads, num_groups, head_dim), place = tensors.shape.heads, tensors.place
        # A causal document of n tokens has n (n + 1) / 2 pairs; this is n to within one token.
        num_tokens = round(math.sqrt(2 * tensors.shape.num_pairs))
        heads = num_heads, num_groups, num_groups
        leaves = [torch.randn(1, n, num_tokens, head_dim, device=place.device, dtype=place.dtype) for n in heads]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        direction = torch.randn_like(leaves[0])
        backends = (
            [SDPBackend.FLASH_ATTENTION] if place.device.type == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        )

        def forward_and_backward() -> object:
            with sdpa_kernel(backends):
                output = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
                return torch.autograd.grad(output, leaves, direction)

        return forward_and_backward

    return make


def parts(shape: AttentionShape) -> dict[str, StepPart]:
    num_rows = shape.position_Q.numel()
    num_keys = shape.num_tokens + shape.num_ancestors * num_rows
    return {"attention": attention_part(num_rows, num_keys, shape.num_pairs, shape.heads)}


def figures(shape: AttentionShape, seconds: float) -> dict[str, float]:
    return {"TFLOP/s": tera_flops_per_s(shape.num_pairs, shape.heads, seconds)}


BENCHMARK = Benchmark(
    module="benchmarks.kernels.bench_ancestor_attention",
    shapes=_shapes(),
    default_shapes={"cpu": ("cpu-*",), "cuda": ("*k-*",)},
    providers={
        "reference": Provider(partial(_ancestor_attention, "reference")),
        "blocked": Provider(partial(_ancestor_attention, "blocked_attention"), devices=("cpu",)),
        "triton": Provider(partial(_ancestor_attention, "ancestor_attention"), devices=("cuda",)),
        "flash": Provider(partial(_ancestor_attention, "prefix_flash"), devices=("cuda",)),
        "sdpa": Provider(_plain_causal),
    },
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
