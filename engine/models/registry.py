"""Facts about target families that their configs do not state in one uniform way."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, masking_utils

CHUNKS_START_WITH_DOCUMENTS = hasattr(masking_utils, "remap_positions_for_packed_sequence")

# What a family multiplies (+1) or divides (-1) its logits, or the state its head reads, by.
_SCALE_FIELDS = {
    "cohere": ("logit_scale", 1),
    "cohere2": ("logit_scale", 1),
    "cohere2_moe": ("logit_scale", 1),
    "cohere_compass_text": ("logit_scale", 1),
    "falcon_h1": ("lm_head_multiplier", 1),
    "granite": ("logits_scaling", -1),
    "granite_docling_text": ("logits_scaling", -1),
    "granite_swa": ("logits_scaling", -1),
    "granitemoe": ("logits_scaling", -1),
    "granitemoe_swa": ("logits_scaling", -1),
    "granitemoehybrid": ("logits_scaling", -1),
    "granitemoeshared": ("logits_scaling", -1),
    "hyperclovax": ("logits_scaling", 1),
    "minicpm3": ("logits_scaling", -1),
    "muse_glimmer_text": ("output_multiplier", 1),
    "muse_spark_text": ("output_multiplier", 1),
}
_SOFT_CAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Kinds of layer whose tokens meet in attention only, under a mask that Transformers lets others build.
_ISOLATED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Families that attend under masks of their own making.
_ONE_BY_ONE = {"doge", "gemma4_unified_text"}
# Families that SGLang runs on its DeepSeek-V2 code.
_SERVED_AS_DEEPSEEK = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k2", "kimi_k25"}
_REFUSED = {
    "chameleon": "forbids its image tokens after the head",
    "inkling_text": "crops its padded vocabulary after the head",
    "inkling2_text": "crops its padded vocabulary after the head",
    "modernbert-decoder": "has a head that is not one linear map",
    "musicgen_decoder": "has several heads",
    "musicgen_melody_decoder": "has several heads",
}


@dataclass(frozen=True)
class FinalLogits:
    """What a target does to its logits after the head: `z * scale`, then `soft_cap * tanh(z / soft_cap)`; None = no cap."""

    scale: float
    soft_cap: float | None


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model inside a multimodal wrapper, else `config` itself."""
    return config.get_text_config(decoder=True)


def rope_kinds(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """What a config says of its rotary embeddings: of all, or of each kind of layer that has its own."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """0-based ids of the layers whose outputs feed the draft: 1, L//2-1, L-4.

    Raises ValueError for fewer than 7 layers, where they collapse.
    Source: EAGLE-3 (arXiv:2503.01840), as its serving engines fix it.
    """
    if num_layers < 7:
        raise ValueError(
            f"target.aux_layers must be given for a target of {num_layers} layers: the default 1, L//2-1, L-4 needs 7; "
            f"name three distinct layers below {num_layers - 1}"
        )
    return 1, num_layers // 2 - 1, num_layers - 4


def check_aux_layers(layers: tuple[int, ...], num_layers: int) -> tuple[int, int, int]:
    """`layers` as a tuple, if they are three distinct ascending ids and none is the last layer; else ValueError."""
    layers = tuple(layers)
    ascending = all(a < b for a, b in zip(layers, layers[1:], strict=False))
    if len(layers) != 3 or not ascending or layers[0] < 0 or layers[-1] >= num_layers - 1:
        raise ValueError(
            f"target.aux_layers={list(layers)}: expected three distinct ascending layers from 0 to {num_layers - 2} "
            f"for a target of {num_layers} layers (servers never capture the last one)"
        )
    return layers


def check_served_aux_layers(model_type: str, layers: tuple[int, ...]) -> None:
    """Raise ValueError if a server would capture other layers of this family than the ones named.

    SGLang reads the ids as layer outputs, but its DeepSeek code only where the first id is 1, else as layer inputs.
    """
    if model_type in _SERVED_AS_DEEPSEEK and layers[0] != 1:
        raise ValueError(
            f"target.aux_layers={list(layers)}: SGLang would capture the layers before these of a {model_type!r} target, "
            "unless the first is layer 1; start the list with 1"
        )


def final_logits(config: PreTrainedConfig) -> FinalLogits:
    """What the target of this config, or of its text config, applies after its LM head.

    Raises ValueError for families whose head is more than a linear map, a scale and a soft-cap.
    """
    config = text_config(config)
    family = config.model_type
    if family in _REFUSED:
        raise ValueError(f"target family {family!r} {_REFUSED[family]}, which a draft cannot be taught; use another target")
    scale = 1.0
    if family in _SCALE_FIELDS:
        field, power = _SCALE_FIELDS[family]
        value = getattr(config, field)
        scale = 1.0 if value is None else float(value) ** power
    caps = [getattr(config, field) for field in _SOFT_CAP_FIELDS if hasattr(config, field)]
    return FinalLogits(scale, float(caps[0]) if caps and caps[0] is not None else None)


def runs_packed(config: PreTrainedConfig) -> bool:
    """Whether documents laid end to end can share one forward of this target, given attention kept inside each document.

    Not so for layers that carry state from token to token, for RoPE that depends on the forwards of before, and, before
    Transformers 5.23, for attention in chunks of it.
    """
    config = text_config(config)
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        kinds <= _ISOLATED_LAYERS
        and config.model_type not in _ONE_BY_ONE
        and not any(rope.get("rope_type") == "dynamic" and not rope.get("alpha") for rope in rope_kinds(config))
        and (CHUNKS_START_WITH_DOCUMENTS or "chunked_attention" not in kinds)
    )
