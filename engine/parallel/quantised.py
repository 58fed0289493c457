"""Checkpoints in the quantised layouts that they are published in: a quantised weight is read where it is quantised."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from engine.config import TargetSection
from engine.parallel.loader import Checkpoint
from engine.parallel.quantised_weight import QuantisedWeight
from engine.parallel.rules import Cut

SCALE, WEIGHT, SCALE_ALONE = "_scale_inv", ".weight", ".scale"
BLOCKS, SCALES = "_blocks", "_scales"
PACKED, SCALE_4 = "_packed", "_scale"
PER_BYTE = 2  # values of 4 bits
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (*E2M1, *(-value for value in E2M1))
INT4 = tuple(float(code - 8) for code in range(16))


def _part(weight: QuantisedWeight, cut: Cut | None) -> Tensor:
    """Of files that are mapped, no more is read than it takes."""
    return weight if cut is None or cut.zeros else cut.of(weight)


class Fp8Checkpoint(Checkpoint):
    """Weights in fp8 with a scale a block: `NAME_scale_inv` (DeepSeek-V3, Kimi-K2, Qwen3-FP8), or `scale` beside `weight`
    (DeepSeek-V4). A scale is a number, or the exponent of a power of two, in a byte (`ue8m0`)."""

    def __init__(self, path: str, revision: str | None, block: tuple[int, int], row_group: int | None = None) -> None:
        """block: rows and columns that a scale is of. row_group: as of a `QuantisedWeight`.

        Raises ValueError if a weight beside a scale is not in fp8, as experts in fp4 are not.
        """
        super().__init__(path, revision)
        self._block, self._row_group = block, row_group
        self._scales = {name: scale for name in self._by_name if (scale := self._scale_of(name)) is not None}
        for name in self._scales:
            if (dtype := self._open[self._by_name[name]].get_slice(name).get_dtype()) != "F8_E4M3":
                problem = f"{name} has a scale and is {dtype}, and only weights in fp8 (e4m3) are read beside others in fp8"
                raise ValueError(f"target.path={path}: {problem}; name a bfloat16 checkpoint")

    def _scale_of(self, name: str) -> str | None:
        beside = name.removesuffix(WEIGHT) + SCALE_ALONE if name.endswith(WEIGHT) else name
        return next((scale for scale in (name + SCALE, beside) if scale in self._by_name and scale != name), None)

    def __iter__(self) -> Iterator[str]:
        scales = {*self._scales.values()}
        return (name for name in super().__iter__() if name not in scales)

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        if name not in self._scales:
            return super().read(name, cut)
        codes, scale = super().read(name), super().read(self._scales[name])
        scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
        block = (1,) * (codes.ndim - 2) + self._block
        return _part(QuantisedWeight(codes, scale, block, row_group=self._row_group), cut)


class Mxfp4Checkpoint(Checkpoint):
    """Experts in MXFP4 (GPT-OSS): of NAME, `NAME_blocks` uint8 [E, out, in / 32, 16] and `NAME_scales` uint8 [E, out, in / 32].

    NAME itself is [E, in, out], as the model has it. A scale is a power of two, its exponent 127 above what it means.
    """

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(BLOCKS) for name in super().__iter__() if not name.endswith(SCALES))

    def shape(self, name: str) -> list[int]:
        if name in self._by_name:
            return super().shape(name)
        experts, out, groups, packed = super().shape(name + BLOCKS)
        return [experts, groups * packed * PER_BYTE, out]

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        if name in self._by_name:
            return super().read(name, cut)
        blocks, exponent = super().read(name + BLOCKS), super().read(name + SCALES)
        scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.bfloat16), exponent.int() - 127)
        block, packing = (1, 1, blocks.shape[-1] * PER_BYTE), (1, 1, PER_BYTE)
        weight = QuantisedWeight(blocks.flatten(2), scale, block, meanings=FP4, packing=packing)
        return _part(weight.transpose(1, 2), cut)


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
        if name in self._by_name:
            return super().read(name, cut)
        packed, scale, columns = super().read(name + PACKED), super().read(name + SCALE_4), self.shape(name)[1]
        block, packing = (1, -(-columns // scale.shape[1])), (1, PER_BYTE)
        weight = QuantisedWeight(packed.view(torch.uint8), scale, block, meanings=INT4, packing=packing)
        return _part(weight[:, :columns], cut)


def _is_packed_int4(facts: dict[str, Any]) -> bool:
    """Whether all that is quantised is in symmetric int4, by groups of columns or by row."""
    groups = [group.get("weights") or {} for group in (facts.get("config_groups") or {}).values()]
    plain = all(group.get("num_bits") == 4 and group.get("type", "int") == "int" and group.get("symmetric") for group in groups)
    return bool(groups) and plain and facts.get("format") == "pack-quantized"


def layout_of(config: PreTrainedConfig) -> tuple[str | None, dict[str, Any]]:
    """ "fp8", "mxfp4" or "int4" where a config's checkpoint is in a layout of ours, else None; and what it says of it."""
    quantised = getattr(config, "quantization_config", None) or {}
    facts = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = facts.get("quant_method")
    if method == "compressed-tensors" and _is_packed_int4(facts):
        return "int4", facts
    return method if method == "mxfp4" or (method == "fp8" and facts.get("weight_block_size")) else None, facts


@dataclass(frozen=True)
class StaysQuantised:
    """Which weights stay quantised, as far as a config tells.

    value_bytes: of one, its share of a scale included. input_bytes: the same of what they are multiplied with, 0 where that
    stays as it is.
    """

    value_bytes: float
    only_experts: bool
    skipped: tuple[str, ...] = ()
    input_bytes: float = 0.0

    @classmethod
    def of(cls, config: PreTrainedConfig, keep: str, fp8_activations: bool = False) -> "StaysQuantised | None":
        """None where all are dequantised. keep, fp8_activations: as in `target`."""
        layout, facts = layout_of(config)
        if layout is None or keep not in (layout, "all"):
            return None
        if layout == "fp8":
            rows, columns = facts["weight_block_size"]
            skipped = tuple(facts.get("modules_to_not_convert") or ())
            return cls(1 + 4 / (rows * columns), False, skipped, 1 + 4 / columns if fp8_activations else 0.0)
        groups = [group["weights"].get("group_size") or 0 for group in (facts.get("config_groups") or {}).values()]
        size = 32 if layout == "mxfp4" else min(groups)
        return cls(1 / PER_BYTE + (2 / size if size > 0 else 0), True)

    def holds(self, name: str, is_expert: bool, is_linear: bool) -> bool:
        """Whether a weight of a decoder stays quantised."""
        parts = name.split(".")
        for skipped in self.skipped:  # whole names from anywhere above, or parts of them
            wanted = skipped.split(".")
            while wanted and wanted[0] not in parts:
                wanted = wanted[1:]
            if wanted and any(parts[start : start + len(wanted)] == wanted for start in range(len(parts))):
                return False
        return is_expert or (is_linear and not self.only_experts)


def check_fp8_activations(config: PreTrainedConfig, section: TargetSection) -> None:
    """Raises ValueError where `target.fp8_activations` is asked of a target without weights in fp8, or whose activations
    servers quantise in another way."""
    layout, facts = layout_of(config)
    if not section.fp8_activations:
        return
    scheme, scales, path = facts.get("activation_scheme") or "dynamic", facts.get("scale_fmt"), f"target.path={section.path}"
    if layout != "fp8":
        found = f"in {layout}" if layout else "not in fp8 with a scale a block"
        problem = f"the weights of {path} are {found}, so nothing is multiplied in fp8"
    elif scheme != "dynamic" or scales is not None:
        found = f"scale_fmt={scales}" if scales is not None else f"activation_scheme={scheme}"
        problem = f"servers of {path} quantise activations by {found}, and here each group has a scale in fp32"
    else:
        return
    raise ValueError(f"target.fp8_activations=true: {problem}; set it to false, or name an fp8 checkpoint")


def open_checkpoint(
    config: PreTrainedConfig, path: str, revision: str | None, keep: str = "fp8", fp8_activations: bool = False
) -> Checkpoint:
    """The checkpoint of a config, which forgets that it is quantised. keep, fp8_activations: as in `target`.

    Raises ValueError for quantisations of no layout of ours.
    """
    layout, facts = layout_of(config)
    if not facts:
        return Checkpoint(path, revision)
    if layout is None:
        method = facts.get("quant_method")
        problem = f"is quantised by {method!r}, and only fp8 with a scale a block, mxfp4 and packed int4 can be shared"
        raise ValueError(f"target.path={path}: {problem}; name a bfloat16 checkpoint, or set parallel.tp_size=1 and ep_size=1")
    del config.quantization_config
    if layout == "fp8":
        block = tuple(facts["weight_block_size"])
        checkpoint: Checkpoint = Fp8Checkpoint(path, revision, block, block[1] if fp8_activations else None)
    else:
        checkpoint = {"mxfp4": Mxfp4Checkpoint, "int4": Int4Checkpoint}[layout](path, revision)
    checkpoint.stays_quantised = keep in (layout, "all")
    return checkpoint
