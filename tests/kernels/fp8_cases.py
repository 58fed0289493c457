"""Weights of experts in fp8, drawn at random, and their products with rows, for the kernels that multiply them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_weights(
    num_outputs: int, num_inputs: int, block: tuple[int, int], counts: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [X, N, K] of all values but NaN, a scale a block, and the ends of `counts` rows an expert, None of one expert."""
    num_experts = len(counts)
    blocks = [-(-size // step) for size, step in zip((num_outputs, num_inputs), block, strict=True)]
    codes = torch.randint(0, 256, (num_experts, num_outputs, num_inputs), generator=generator, dtype=torch.uint8)
    codes = torch.where(codes % 128 == 127, 0, codes)
    scale = torch.rand(num_experts, *blocks, generator=generator) * 1e-3 + 1e-4
    ends = None if num_experts == 1 else torch.tensor(counts).cumsum(0).int()
    return codes.view(torch.float8_e4m3fn), scale, ends


def exact_product(rows_MK: Tensor, weight_XNK: Tensor, ends_X: Tensor | None) -> Tensor:
    """[M, N] in float64: each row times the transpose of its own expert's weight."""
    ends = [len(rows_MK)] if ends_X is None else ends_X.tolist()
    parts = zip([0, *ends], ends, weight_XNK.double(), strict=False)
    return torch.cat([rows_MK[start:end].double() @ weight_NK.mT for start, end, weight_NK in parts])


def to_device(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(device) for x in tensors]
