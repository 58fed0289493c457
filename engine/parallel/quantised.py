"""Quantised checkpoints, read as what they mean: each value times its scale, for the part that a rank holds."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.parallel.loader import Checkpoint
from engine.parallel.rules import Cut

SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
PER_BYTE = 2  # values of 4 bits


class Fp8Checkpoint(Checkpoint):
    """Weights in fp8 with an fp32 scale a block, `NAME_scale_inv` (DeepSeek-V3, Kimi-K2, Qwen3-FP8)."""

    def __init__(self, path: str, revision: str | None, block: tuple[int, int]) -> None:
        """block: rows and columns that a scale is of."""
        super().__init__(path, revision)
        self._block = block

    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if not name.endswith(SCALE))

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """fp32 where it was quantised."""
        tensor = super().read(name, cut)
        if name + SCALE not in self._by_name:
            return tensor
        scale = super().read(name + SCALE).float()
        for dim, (size, block) in enumerate(zip(self.shape(name), self._block, strict=True)):
            index = torch.arange(size) // block
            if cut is not None and not cut.zeros and cut.dim == dim:
                index = Cut(0, cut.intervals).of(index)
            scale = scale.index_select(dim, index)
        return tensor.float() * scale


class Mxfp4Checkpoint(Checkpoint):
    """Experts in MXFP4 (GPT-OSS): of NAME, `NAME_blocks` uint8 [E, out, in / 32, 16] and `NAME_scales` uint8 [E, out, in / 32].

    NAME itself is [E, in, out], as the model has it.
    """

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(BLOCKS) for name in super().__iter__() if not name.endswith(SCALES))

    def shape(self, name: str) -> list[int]:
        if name in self._by_name:
            return super().shape(name)
        experts, out, groups, packed = super().shape(name + BLOCKS)
        return [experts, groups * packed * PER_BYTE, out]

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """bf16, which holds every value of it, where it was quantised; an expert at a time."""
        if name in self._by_name:
            return super().read(name, cut)
        of_experts = cut is not None and not cut.zeros and cut.dim == 0
        intervals = cut.intervals if of_experts else ((0, self.shape(name)[0]),)
        parts = []
        for expert in (expert for start, stop in intervals for expert in range(start, stop)):
            one = Cut(0, ((expert, expert + 1),))
            part = convert_moe_packed_tensors(super().read(name + BLOCKS, one), super().read(name + SCALES, one))
            parts.append(part if of_experts or cut is None or cut.zeros else cut.of(part))
        return torch.cat(parts)


def open_checkpoint(config: PreTrainedConfig, path: str, revision: str | None) -> Checkpoint:
    """The checkpoint of a config, which forgets that it is quantised. Raises ValueError for other quantisations."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return Checkpoint(path, revision)
    facts = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method, block = facts.get("quant_method"), facts.get("weight_block_size")
    if method != "mxfp4" and not (method == "fp8" and block):
        problem = f"is quantised by {method!r}, and only fp8 with a scale a block and mxfp4 can be shared"
        raise ValueError(f"target.path={path}: {problem}; name a bfloat16 checkpoint, or set parallel.tp_size=1 and ep_size=1")
    del config.quantization_config
    return Mxfp4Checkpoint(path, revision) if method == "mxfp4" else Fp8Checkpoint(path, revision, tuple(block))
