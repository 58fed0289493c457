"""Shapes, RoPE and token ids that a draft takes from its target's config."""

from typing import Any, Protocol

from transformers import PreTrainedConfig

from engine.config.sections import DraftSection
from engine.models.target_families import text_config

TokenId = int | tuple[int, ...] | None

# RoPE types that a draft can have, with the parameters that all servers interpret in the same way.
# YaRN's mscale, mscale_all_dim and attention_factor are left out: Transformers and some servers
# read them, others ignore them. Without them all use 0.1 ln(factor) + 1.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_DTYPES = ("bfloat16", "float16", "float32")
_OPTIONAL_ROPE_KEYS = ("beta_fast", "beta_slow", "truncate")
_UNSCALED_ROPE = ("mrope", "proportional")
# If layer types have their own RoPE, the draft uses that of one of these (DeepSeek-V4: main).
_ROPE_LAYERS = ("full_attention", "main")


class LayerShapes(Protocol):
    """What `check_layer_shapes` reads of a draft's config."""

    @property
    def head_dim(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def rope_parameters(self) -> dict[str, Any]: ...
    @property
    def dtype(self) -> str: ...


def check_layer_shapes(draft: LayerShapes) -> None:
    """Raise ValueError for layers that no draft can have."""
    if draft.head_dim % 2:
        raise ValueError(f"head_dim={draft.head_dim} is odd, but RoPE rotates pairs; choose an even head_dim")
    if draft.num_attention_heads % draft.num_key_value_heads:
        raise ValueError(
            f"draft.num_attention_heads={draft.num_attention_heads} is not a multiple of "
            f"draft.num_key_value_heads={draft.num_key_value_heads}; give a divisor"
        )
    if draft.dtype not in _DTYPES:
        raise ValueError(f"dtype={draft.dtype!r}: a draft's weights have one of {list(_DTYPES)}")
    if draft.hidden_act != "silu":
        raise ValueError(f"hidden_act={draft.hidden_act!r}: a draft has SwiGLU; use 'silu'")
    if draft.rope_parameters["rope_type"] not in ROPE_KEYS:
        raise ValueError(f"rope_type={draft.rope_parameters['rope_type']!r}: a draft can have one of {sorted(ROPE_KEYS)}")


def attention_shape(target: PreTrainedConfig, draft: DraftSection) -> tuple[int, int, int]:
    """Return query heads H, key/value heads G and head dim E of a draft.

    Raises ValueError if the target has different heads in different layers.
    """
    if first_of(target, ("kv_lora_rank",), None) is not None:
        head_dim = 128
        heads = draft.num_attention_heads or 1 << (-(-target.hidden_size // head_dim) - 1).bit_length()
        return heads, draft.num_key_value_heads or min(8, heads), head_dim
    target_heads = required(target, "num_attention_heads")
    heads = draft.num_attention_heads or target_heads
    groups = draft.num_key_value_heads or first_of(target, ("num_key_value_heads",), heads)
    head_dim = first_of(target, ("head_dim",), target.hidden_size // target_heads)
    if not all(isinstance(count, int) for count in (heads, groups, head_dim)):
        raise ValueError(f"target family {target.model_type!r} has different heads in different layers; give draft.config")
    return heads, groups, head_dim


def dense_width(target: PreTrainedConfig) -> int:
    """Return the width of an MLP of the target that is not an expert's, or 3.5 D if its config states none."""
    width = first_of(target, ("intermediate_size_mlp", "intermediate_size"), 0)
    if isinstance(width, int) and width >= 2 * target.hidden_size:
        return width
    return -(-7 * target.hidden_size // 512) * 256


def derived_rope(target: PreTrainedConfig) -> dict[str, Any]:
    """Return the RoPE parameters of a draft. Raises ValueError for RoPE that a draft cannot follow."""
    rope = first_of(target, ("rope_parameters",), None) or _legacy_rope(target)
    if "rope_theta" not in rope:
        kind = next((kind for kind in _ROPE_LAYERS if kind in rope), None)
        if kind is None:
            raise ValueError(f"target family {target.model_type!r} has RoPE per layer type {sorted(rope)}; give draft.config")
        rope = rope[kind]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = "default" if kind in _UNSCALED_ROPE else kind
    if kind not in ROPE_KEYS:
        raise ValueError(
            f"target family {target.model_type!r} has {kind!r} RoPE, which a draft cannot follow; give draft.config with "
            f"rope_parameters of one of {sorted(ROPE_KEYS)}"
        )
    missing = [key for key in ROPE_KEYS[kind] if rope.get(key) is None]
    if missing:
        raise ValueError(f"the target's {kind!r} RoPE lacks {missing}; add them to its config.json")
    kept = ROPE_KEYS[kind] + (_OPTIONAL_ROPE_KEYS if kind == "yarn" else ())
    scaling = {key: rope[key] for key in kept if rope.get(key) is not None}
    return {"rope_type": kind, "rope_theta": rope["rope_theta"]} | scaling


def _legacy_rope(target: PreTrainedConfig) -> dict[str, Any]:
    scaling = first_of(target, ("rope_scaling",), None) or {}
    return dict(scaling) | {"rope_theta": first_of(target, ("rope_theta",), 10000.0)}


def first_of(config: PreTrainedConfig, names: tuple[str, ...], otherwise: Any) -> Any:
    """Return the first of these attributes that a target config has and that is not None."""
    try:
        values = [getattr(config, name) for name in names if hasattr(config, name)]
    except RuntimeError as error:  # Transformers raises it for values that differ between layers
        problem = f"target family {config.model_type!r} has different values of {names[-1]} in different layers"
        raise ValueError(f"{problem}; give draft.config") from error
    return next((value for value in values if value is not None), otherwise)


def required(config: PreTrainedConfig, name: str) -> Any:
    """Return an attribute of a target config. Raises ValueError if there is none."""
    value = first_of(config, (name,), None)
    if value is None:
        raise ValueError(f"the config of target family {config.model_type!r} has no {name}; give draft.config")
    return value


def target_token(config: PreTrainedConfig, name: str) -> TokenId:
    """Return a token id from a target's text config, or from the config around it."""
    inner = first_of(text_config(config), (name,), None)
    return token_id_of(first_of(config, (name,), None) if inner is None else inner)


def token_id_of(value: Any) -> TokenId:
    """Return one or several token ids as read from JSON."""
    return tuple(value) if isinstance(value, list | tuple) else value


def exported_rope(exported: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE parameters of a config.json, under their old or new names."""
    rope = dict(exported.get("rope_scaling") or {}) | dict(exported.get("rope_parameters") or {})
    old_name = rope.pop("type", "default")
    return {"rope_type": old_name, "rope_theta": exported.get("rope_theta", 10000.0)} | rope
