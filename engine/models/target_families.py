"""Facts about target families that their configs do not state uniformly."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, masking_utils

CHUNKS_START_WITH_DOCUMENTS = hasattr(masking_utils, "remap_positions_for_packed_sequence")

# Config field by which a family multiplies (+1) or divides (-1) its logits or its head's input.
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
    "inkling_text": ("logits_mup_width_multiplier", -1),
    "minicpm3": ("logits_scaling", -1),
    "muse_glimmer_text": ("output_multiplier", 1),
    "muse_spark_text": ("output_multiplier", 1),
}
_SOFT_CAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Layer types in which tokens interact only in attention, with a mask that the caller can supply.
_ISOLATED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Families that build their own attention masks.
_ONE_BY_ONE = {"doge"}
# Families with a cache that claims to support rollback but does not: DeepSeek-V4 compresses keys of
# several tokens into one, and replies of Doge were found to change.
_NO_ROLLBACK = {"deepseek_v4", "doge"}
# Config fields with the number of residual streams (hyper-connections), and fields with the number
# of layers in families that do not use num_hidden_layers for it.
_STREAM_FIELDS = ("hc_mult", "hc_count")
_LAYER_FIELDS = {"longcat_flash": "num_layers"}  # num_hidden_layers counts two per layer
# Families that SGLang runs on its DeepSeek-V2 code.
_SERVED_AS_DEEPSEEK = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k2", "kimi_k25"}
_REFUSED = {
    "chameleon": "forbids its image tokens after the head, which a draft cannot be taught",
    "gemma3n_text": "keeps several states a token (AltUp), and no server says which of them a draft reads",
    "hrm_text": "runs the same layers several times over, so none has one output for a draft to read",
    "inkling2_text": "lets layers read the states of all earlier blocks, and no server says what of them a draft reads",
    "modernbert-decoder": "has a head that is not one linear map, which a draft cannot be taught",
    "musicgen_decoder": "has several heads, which a draft cannot be taught",
    "musicgen_melody_decoder": "has several heads, which a draft cannot be taught",
}


@dataclass(frozen=True)
class FinalLogits:
    """Transform that a target applies to its logits after the head.

    It is `z * scale`, then `soft_cap * tanh(z / soft_cap)`; soft_cap: None = no cap.
    num_tokens: number of rows of the head that are tokens; the others are padding and never occur.
        None = all rows.
    """

    scale: float
    soft_cap: float | None
    num_tokens: int | None = None


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the language model's config inside a multimodal config, or `config` itself."""
    return config.get_text_config(decoder=True)


def rope_kinds(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the RoPE parameters of a config, then those of each layer type that has its own."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def check_family(config: PreTrainedConfig) -> None:
    """Raise ValueError if no draft can be trained for a target with this config.

    The message names the family and the reason.
    """
    config = text_config(config)
    family = config.model_type
    why = _REFUSED.get(family)
    if family == "doge" and config.is_moe:
        why = "chooses experts by other tokens of the forward, later ones among them"
    if why is not None:
        raise ValueError(f"target family {family!r} {why}; use another target")


def cache_rolls_back(config: PreTrainedConfig) -> bool:
    """Return whether the family's cache can drop its last tokens if it claims to support that."""
    return text_config(config).model_type not in _NO_ROLLBACK


def num_layers(config: PreTrainedConfig) -> int:
    """Return the number of decoder layers, as servers count them."""
    config = text_config(config)
    return getattr(config, _LAYER_FIELDS.get(config.model_type, "num_hidden_layers"))


def num_streams(config: PreTrainedConfig) -> int:
    """Return the number of residual streams between layers. A draft reads their mean.

    Source: servers average the streams when they capture the output of such a layer: SGLang's
    `hc_contract`, vLLM's Ascend port and RTP-LLM for DeepSeek-V4.
    """
    config = text_config(config)
    return next((getattr(config, field) for field in _STREAM_FIELDS if hasattr(config, field)), 1)


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """Return the default 0-based ids of the layers that the draft reads: 1, L//2-1, L-4.

    Raises ValueError for fewer than 7 layers, where these ids are not distinct and ascending.
    Source: EAGLE-3 (arXiv:2503.01840), with the ids that its serving engines use.
    """
    if num_layers < 7:
        raise ValueError(
            f"target.aux_layers must be given for a target of {num_layers} layers: the default 1, L//2-1, L-4 needs 7; "
            f"name three distinct layers below {num_layers - 1}"
        )
    return 1, num_layers // 2 - 1, num_layers - 4


def check_aux_layers(layers: tuple[int, ...], num_layers: int, how_many: int | None = None) -> tuple[int, ...]:
    """Return `layers` as a tuple after checking them.

    how_many: number of layers that the draft method reads; None = any number.
    Raises ValueError unless they are distinct ascending ids below the last layer.
    """
    layers = tuple(layers)
    ascending = all(a < b for a, b in zip(layers, layers[1:], strict=False))
    is_wrong_number = len(layers) == 0 if how_many is None else len(layers) != how_many
    if is_wrong_number or not ascending or layers[0] < 0 or layers[-1] >= num_layers - 1:
        expected = "distinct ascending layers" if how_many is None else f"{how_many} distinct ascending layers"
        raise ValueError(
            f"target.aux_layers={list(layers)}: expected {expected} from 0 to {num_layers - 2} "
            f"for a target of {num_layers} layers (servers never capture the last one)"
        )
    return layers


def check_served_aux_layers(model_type: str, layers: tuple[int, ...]) -> None:
    """Raise ValueError if a server would capture other layers of this family than `layers`.

    SGLang interprets the ids as layer outputs. Its DeepSeek code does so only if the first id is 1;
    otherwise it interprets them as layer inputs.
    """
    if model_type in _SERVED_AS_DEEPSEEK and layers[0] != 1:
        raise ValueError(
            f"target.aux_layers={list(layers)}: SGLang would capture the layers before these of a {model_type!r} target, "
            "unless the first is layer 1; start the list with 1"
        )


def final_logits(config: PreTrainedConfig) -> FinalLogits:
    """Return the transform that the target of this config applies after its LM head.

    Raises ValueError for families that are refused, which include those with other transforms.
    """
    check_family(config)
    config = text_config(config)
    family = config.model_type
    scale = 1.0
    if family in _SCALE_FIELDS:
        field, power = _SCALE_FIELDS[family]
        value = getattr(config, field)
        scale = 1.0 if value is None else float(value) ** power
    caps = [getattr(config, field) for field in _SOFT_CAP_FIELDS if hasattr(config, field)]
    num_tokens = getattr(config, "unpadded_vocab_size", None)
    return FinalLogits(scale, float(caps[0]) if caps and caps[0] is not None else None, num_tokens)


def runs_packed(config: PreTrainedConfig) -> bool:
    """Return whether packed documents can share one forward pass of this target.

    Attention is assumed to stay within each document. They cannot share it if any of these applies:

    - Layers carry state from token to token.
    - RoPE depends on previous forward passes.
    - Scores are scaled by a token's position in the forward pass (except Llama 4's, see
      target/attention.py).
    - Attention runs in chunks of the forward pass, before Transformers 5.23.
    """
    config = text_config(config)
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        kinds <= _ISOLATED_LAYERS
        and config.model_type not in _ONE_BY_ONE
        and not (getattr(config, "attn_temperature_tuning", False) and config.model_type != "llama4_text")
        and not any(rope.get("rope_type") == "dynamic" and not rope.get("alpha") for rope in rope_kinds(config))
        and (CHUNKS_START_WITH_DOCUMENTS or "chunked_attention" not in kinds)
    )
