"""Quantised checkpoints, read as what they mean: each value times its scale, for the part that a rank holds."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.parallel.loader import Checkpoint
from engine.parallel.rules import Cut

SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
PACKED, SCALE_4 = "_packed", "_scale"
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


class Int4Checkpoint(Checkpoint):
    """Weights in compressed-tensors' packed int4 (Kimi-K2-Thinking, K2.5).

    Of NAME, `NAME_packed` int32 [out, in / 8], the first of eight values in the lowest bits, 8 above what it means;
    `NAME_scale` [out, in / group size]; `NAME_shape` int64 [2].
    """

    def __iter__(self) -> Iterator[str]:
        names = (name for name in super().__iter__() if not name.endswith((f"weight{SCALE_4}", "weight_shape")))
        return (name.removesuffix(PACKED) for name in names)

    def shape(self, name: str) -> list[int]:
        if name in self._by_name:
            return super().shape(name)
        return super().read(f"{name}_shape").tolist()

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """fp32 where it was quantised."""
        if name in self._by_name:
            return super().read(name, cut)
        packed, scale, (rows, columns) = super().read(name + PACKED), super().read(name + SCALE_4).float(), self.shape(name)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        values = ((packed[..., None] >> shifts & 15) - 8).reshape(rows, -1)[:, :columns].float()
        tensor = values * scale.repeat_interleave(-(-columns // scale.shape[1]), dim=1)[:, :columns]
        return tensor if cut is None or cut.zeros else cut.of(tensor)


def _is_packed_int4(facts: dict[str, Any]) -> bool:
    """Whether all that is quantised is in symmetric int4, by groups of columns or by row."""
    groups = [group.get("weights") or {} for group in (facts.get("config_groups") or {}).values()]
    plain = all(group.get("num_bits") == 4 and group.get("type", "int") == "int" and group.get("symmetric") for group in groups)
    return bool(groups) and plain and facts.get("format") == "pack-quantized"


def open_checkpoint(config: PreTrainedConfig, path: str, revision: str | None) -> Checkpoint:
    """The checkpoint of a config, which forgets that it is quantised. Raises ValueError for other quantisations."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return Checkpoint(path, revision)
    facts = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method, block = facts.get("quant_method"), facts.get("weight_block_size")
    int4 = method == "compressed-tensors" and _is_packed_int4(facts)
    if method != "mxfp4" and not int4 and not (method == "fp8" and block):
        problem = f"is quantised by {method!r}, and only fp8 with a scale a block, mxfp4 and packed int4 can be shared"
        raise ValueError(f"target.path={path}: {problem}; name a bfloat16 checkpoint, or set parallel.tp_size=1 and ep_size=1")
    del config.quantization_config
    if int4:
        return Int4Checkpoint(path, revision)
    return Mxfp4Checkpoint(path, revision) if method == "mxfp4" else Fp8Checkpoint(path, revision, tuple(block))
