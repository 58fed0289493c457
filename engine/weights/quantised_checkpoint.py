"""Checkpoints in published quantised layouts. Quantised weights are read as `QuantisedWeight`."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from engine.config.sections import TargetSection
from engine.parallel.rules import ShardSpec
from engine.weights.quantised_weight import QuantisedWeight
from engine.weights.scaled_weights import FP4, NVFP4_BLOCK, PACKED, PER_BYTE, ScaledCheckpoint
from engine.weights.weight_reader import Checkpoint, own_part

SCALE = "_scale_inv"
WEIGHT = ".weight"
SCALE_ALONE = ".scale"
BLOCKS = "_blocks"
SCALES = "_scales"
SCALE_4 = "_scale"
INT4 = tuple(float(code - 8) for code in range(16))


class Fp8Checkpoint(Checkpoint):
    """A checkpoint with weights in fp8 and one scale per block.

    The scale of NAME is `NAME_scale_inv` (DeepSeek-V3, Kimi-K2, Qwen3-FP8), or `scale` next to
    `weight` (DeepSeek-V4). A scale is a number, or the exponent of a power of two in one byte
    (`ue8m0`).
    """

    def __init__(self, path: str, revision: str | None, block: tuple[int, int], row_group: int | None = None) -> None:
        """Open the checkpoint and find the scale of each weight.

        block: numbers of rows and columns that share a scale.
        row_group: see `QuantisedWeight`.
        Raises ValueError if a weight with a scale is not in fp8, for example an expert in fp4.
        """
        super().__init__(path, revision)
        self._block = block
        self._row_group = row_group
        self._scales = {name: scale for name in self._by_name if (scale := self._scale_of(name)) is not None}
        for name in self._scales:
            if (dtype := self._open[self._by_name[name]].get_slice(name).get_dtype()) != "F8_E4M3":
                problem = f"{name} has a scale and is stored as {dtype}; scaled weights must be F8_E4M3"
                raise ValueError(f"target.path={path}: {problem}; name a bfloat16 checkpoint")

    def is_understood(self, name: str) -> bool:
        return name in self._scales or super().is_understood(name)

    def _scale_of(self, name: str) -> str | None:
        beside = name.removesuffix(WEIGHT) + SCALE_ALONE if name.endswith(WEIGHT) else name
        return next((scale for scale in (name + SCALE, beside) if scale in self._by_name and scale != name), None)

    def __iter__(self) -> Iterator[str]:
        scales = {*self._scales.values()}
        return (name for name in super().__iter__() if name not in scales)

    def read(self, name: str, cut: ShardSpec | None = None) -> Tensor:
        if name not in self._scales:
            return super().read(name, cut)
        codes = super().read(name)
        scale = super().read(self._scales[name])
        scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
        block = (1,) * (codes.ndim - 2) + self._block
        return own_part(QuantisedWeight(codes, scale, block, row_group=self._row_group), cut)


class Mxfp4Checkpoint(Checkpoint):
    """A checkpoint with experts in MXFP4 (GPT-OSS).

    NAME is stored as `NAME_blocks`, uint8 [E, out, in / 32, 16], and `NAME_scales`, uint8
    [E, out, in / 32]. It is read as [E, in, out], which is the shape in the model. A scale is a
    power of two, stored as its exponent plus 127.
    """

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(BLOCKS) for name in super().__iter__() if not name.endswith(SCALES))

    def shape(self, name: str) -> list[int]:
        if name in self._by_name:
            return super().shape(name)
        experts, out, groups, packed = super().shape(name + BLOCKS)
        return [experts, groups * packed * PER_BYTE, out]

    def read(self, name: str, cut: ShardSpec | None = None) -> Tensor:
        if name in self._by_name:
            return super().read(name, cut)
        blocks = super().read(name + BLOCKS)
        exponent = super().read(name + SCALES)
        scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.bfloat16), exponent.int() - 127)
        block = (1, 1, blocks.shape[-1] * PER_BYTE)
        packing = (1, 1, PER_BYTE)
        weight = QuantisedWeight(blocks.flatten(2), scale, block, meanings=FP4, packing=packing)
        return own_part(weight.transpose(1, 2), cut)


class Int4Checkpoint(Checkpoint):
    """A checkpoint with weights in compressed-tensors' packed int4 (Kimi-K2-Thinking, K2.5).

    NAME is stored as `NAME_packed`, int32 [out, in / 8], `NAME_scale`, [out, in / group size], and
    `NAME_shape`, int64 [2]. The first of 8 packed values is in the lowest bits. Each value is
    stored plus 8.
    """

    def __iter__(self) -> Iterator[str]:
        names = (name for name in super().__iter__() if not name.endswith((f"weight{SCALE_4}", "weight_shape")))
        return (name.removesuffix(PACKED) for name in names)

    def shape(self, name: str) -> list[int]:
        if name in self._by_name:
            return super().shape(name)
        return super().read(f"{name}_shape").tolist()

    def read(self, name: str, cut: ShardSpec | None = None) -> Tensor:
        if name in self._by_name:
            return super().read(name, cut)
        packed = super().read(name + PACKED)
        scale = super().read(name + SCALE_4)
        columns = self.shape(name)[1]
        block = (1, -(-columns // scale.shape[1]))
        packing = (1, PER_BYTE)
        weight = QuantisedWeight(packed.view(torch.uint8), scale, block, meanings=INT4, packing=packing)
        return own_part(weight[:, :columns], cut)


# Layouts that can be read, with their descriptions in error messages.
LAYOUTS = {
    "fp8": "fp8 with a scale per block",
    "scaled_fp8": "fp8 with a scale per tensor or row",
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4",
    "int4": "packed int4",
}
HOLDS_FP8 = ("fp8", "scaled_fp8", "nvfp4")  # linear maps may be in fp8; NVFP4 mixes both
MODELOPT = ("modelopt", "modelopt_fp8", "modelopt_fp4")
MODELOPT_FP8 = {"FP8", "FP8_PER_CHANNEL_PER_TOKEN"}


def _weight_groups(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the weight settings of each group of modules in a compressed-tensors config."""
    return [group.get("weights") or {} for group in (facts.get("config_groups") or {}).values()]


def _is_packed_int4(facts: dict[str, Any]) -> bool:
    """Return whether all quantised weights are packed symmetric int4.

    Scales may be per group of columns or per row.
    """
    groups = _weight_groups(facts)
    plain = all(group.get("num_bits") == 4 and group.get("type", "int") == "int" and group.get("symmetric") for group in groups)
    return bool(groups) and plain and facts.get("format") == "pack-quantized"


def _bits_and_kind(facts: dict[str, Any]) -> set[tuple[Any, Any, Any]]:
    """Return the distinct (bits, type, strategy) of the weights in a compressed-tensors config."""
    groups = _weight_groups(facts)
    return {(group.get("num_bits"), group.get("type"), group.get("strategy")) for group in groups}


def _layout_of_compressed_tensors(facts: dict[str, Any]) -> str | None:
    if _is_packed_int4(facts):
        return "int4"
    found = _bits_and_kind(facts)
    is_float = found <= {(8, "float", "tensor"), (8, "float", "channel")}
    if facts.get("format") in ("float-quantized", "naive-quantized") and found and is_float:
        return "scaled_fp8"
    if facts.get("format") == "nvfp4-pack-quantized":
        return "nvfp4"
    return None


def _layout_of_modelopt(facts: dict[str, Any]) -> str | None:
    algorithms = {str(facts.get("quant_algo")).upper()}
    if algorithms == {"MIXED_PRECISION"}:
        layers = (facts.get("quantized_layers") or {}).values()
        algorithms = {str(layer.get("quant_algo")).upper() for layer in layers}
    if algorithms <= MODELOPT_FP8:
        return "scaled_fp8"
    # A mix with fp8 counts as NVFP4, because that reader handles both.
    return "nvfp4" if algorithms <= MODELOPT_FP8 | {"NVFP4"} else None


def _levels(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return a config and the config of its language model."""
    return [config, config.get_text_config(decoder=True)]


def _published_facts(config: PreTrainedConfig) -> Any:
    return getattr(config, "quantization_config", None)


def forget_quantisation(config: PreTrainedConfig) -> None:
    """Remove the quantisation settings from a config and from its text config."""
    for level in _levels(config):
        if hasattr(level, "quantization_config"):
            del level.quantization_config


def quantisation_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the quantisation settings of a config as a dict; empty if its checkpoint is not quantised."""
    quantised: Any = next((found for found in map(_published_facts, _levels(config)) if found), {})
    facts = quantised if isinstance(quantised, dict) else quantised.to_dict()
    return facts | (facts.get("quantization") or {})  # nested in older ModelOpt configs


def layout_of(config: PreTrainedConfig) -> tuple[str | None, dict[str, Any]]:
    """Return the layout of a config's checkpoint, and the config's quantisation settings.

    The layout is a key of `LAYOUTS`, or None if the checkpoint is not quantised or in another
    layout.
    """
    facts = quantisation_facts(config)
    method = facts.get("quant_method")
    if method == "compressed-tensors":
        return _layout_of_compressed_tensors(facts), facts
    if method in MODELOPT:
        return _layout_of_modelopt(facts), facts
    if method == "fp8":
        return ("fp8" if facts.get("weight_block_size") else "scaled_fp8"), facts
    if method == "fbgemm_fp8":
        return "scaled_fp8", facts
    return ("mxfp4" if method == "mxfp4" else None), facts


def is_left_to_transformers(config: PreTrainedConfig) -> bool:
    """Return whether Transformers reads a checkpoint quantised in no layout of `LAYOUTS`."""
    layout, facts = layout_of(config)
    method = facts.get("quant_method")
    is_bits_and_bytes = facts.get("load_in_8bit") or facts.get("load_in_4bit")
    is_known = method in AUTO_QUANTIZATION_CONFIG_MAPPING or bool(is_bits_and_bytes)
    return bool(facts) and layout is None and is_known


def check_quantisation(config: PreTrainedConfig, path: str, is_shared: bool) -> None:
    """Raise ValueError if a checkpoint is quantised in a way that cannot be read.

    The message names the quantisation method.
    is_shared: whether several ranks share the target.
    """
    layout, facts = layout_of(config)
    if not facts or layout is not None:
        return
    can_be_alone = is_left_to_transformers(config)
    if can_be_alone and not is_shared:
        if importlib.util.find_spec("accelerate") is None:
            problem = f"target.path={path}: is quantised by {facts.get('quant_method')!r}, which Transformers reads"
            raise ValueError(f"{problem} with the package accelerate; pip install accelerate")
        return
    raise _unreadable(facts, path, can_be_alone)


def _unreadable(facts: dict[str, Any], path: str, can_be_alone: bool) -> ValueError:
    """Return the error for a quantisation in no layout of `LAYOUTS`.

    can_be_alone: whether Transformers can read it on a single rank.
    """
    details = {key: facts.get(key) for key in ("quant_method", "quant_algo", "format") if facts.get(key) is not None}
    method = ", ".join(f"{key} {value!r}" for key, value in details.items()) or "a method that it does not name"
    known = ", ".join(LAYOUTS.values())
    problem = f"target.path={path}: is quantised by {method}, and DraftSpeed reads only {known}"
    advice = "name a checkpoint in one of these or in bfloat16"
    if can_be_alone:
        advice += ", or set parallel.tp_size=1 and ep_size=1, where Transformers reads it"
    return ValueError(f"{problem}; {advice}")


@dataclass(frozen=True)
class StaysQuantised:
    """Description of the weights that stay quantised, as far as it follows from a config.

    value_bytes: bytes per weight value, including its share of a scale.
    only_experts: whether only experts stay quantised.
    skipped: modules that the config lists as not quantised, or parts of their names.
    input_bytes: bytes per input value of a product, including its share of a scale; 0 if inputs are
    not quantised.
    """

    value_bytes: float
    only_experts: bool
    skipped: tuple[str, ...] = ()
    input_bytes: float = 0.0

    @classmethod
    def of(cls, config: PreTrainedConfig, keep: str, fp8_activations: bool = False) -> "StaysQuantised | None":
        """Return the description for a config, or None if all weights are dequantised.

        keep, fp8_activations: `target.keep_quantised` and `target.fp8_activations`.
        """
        layout, facts = layout_of(config)
        if layout is None or keep == "none" or (keep == "fp8" and layout not in ("fp8", "scaled_fp8")):
            return None
        if layout == "scaled_fp8":
            return cls(1.0, False, _left_out(facts))
        if layout == "nvfp4":
            return cls(1 / PER_BYTE + 4 / NVFP4_BLOCK, False, _left_out(facts))
        if layout == "fp8":
            rows, columns = facts["weight_block_size"]
            skipped = tuple(facts.get("modules_to_not_convert") or ())
            return cls(1 + 4 / (rows * columns), False, skipped, 1 + 4 / columns if fp8_activations else 0.0)
        size = 32 if layout == "mxfp4" else min(group.get("group_size") or 0 for group in _weight_groups(facts))
        return cls(1 / PER_BYTE + (2 / size if size > 0 else 0), True)

    def holds(self, name: str, is_expert: bool, is_linear: bool) -> bool:
        """Return whether a weight of a decoder stays quantised."""
        parts = name.split(".")
        for skipped in self.skipped:  # names that may start at an outer module, or parts of names
            wanted = skipped.split(".")
            while wanted and wanted[0] not in parts:
                wanted = wanted[1:]
            if wanted and any(parts[start : start + len(wanted)] == wanted for start in range(len(parts))):
                return False
        return is_expert or (is_linear and not self.only_experts)


def _left_out(facts: dict[str, Any]) -> tuple[str, ...]:
    """Return the modules that a config lists as not quantised, without wildcards at either end."""
    names: list[str] = []
    for key in ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers"):
        names += facts.get(key) or ()
    return tuple(name.removeprefix("re:").strip("*.") for name in names)


def check_fp8_activations(config: PreTrainedConfig, section: TargetSection) -> None:
    """Raise ValueError if `target.fp8_activations` is set for a target that does not support it.

    The target needs weights in fp8 with a scale per block, and a config that lets inference servers
    quantise activations dynamically with scales in fp32.
    """
    layout, facts = layout_of(config)
    if not section.fp8_activations:
        return
    scheme = facts.get("activation_scheme") or "dynamic"
    scales = facts.get("scale_fmt")
    path = f"target.path={section.path}"
    if layout != "fp8":
        found = f"in {LAYOUTS[layout]}" if layout else f"not in {LAYOUTS['fp8']}"
        problem = f"the weights of {path} are {found}, so no product is computed in fp8"
    elif scheme != "dynamic" or scales is not None:
        found = f"scale_fmt={scales}" if scales is not None else f"activation_scheme={scheme}"
        problem = f"servers of {path} quantise activations by {found}, not with fp32 scales per group"
    else:
        return
    raise ValueError(f"target.fp8_activations=true: {problem}; set it to false, or name an fp8 checkpoint")


def open_checkpoint(
    config: PreTrainedConfig, path: str, revision: str | None, keep: str = "fp8", fp8_activations: bool = False
) -> Checkpoint:
    """Open the checkpoint of a config, and remove the quantisation settings from the config.

    keep, fp8_activations: `target.keep_quantised` and `target.fp8_activations`.
    Raises ValueError if the checkpoint is quantised in no layout of `LAYOUTS`.
    """
    layout, facts = layout_of(config)
    if not facts:
        return Checkpoint(path, revision)
    if layout is None:
        raise _unreadable(facts, path, is_left_to_transformers(config))
    forget_quantisation(config)
    if layout == "fp8":
        block = tuple(facts["weight_block_size"])
        checkpoint: Checkpoint = Fp8Checkpoint(path, revision, block, block[1] if fp8_activations else None)
    else:
        readers: dict[str, Callable[[str, str | None], Checkpoint]] = {
            "mxfp4": Mxfp4Checkpoint,
            "int4": Int4Checkpoint,
            "scaled_fp8": ScaledCheckpoint,
            "nvfp4": ScaledCheckpoint,
        }
        checkpoint = readers[layout](path, revision)
    checkpoint.keep = keep
    return checkpoint
