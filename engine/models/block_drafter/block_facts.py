"""Facts in the config.json of a block drafter, checked for what servers read otherwise, or not at all.

Functions raise ValueError that names the file, the key and what to do. `nested` is the contents of `dflash_config`,
and `source` the file, for messages.
"""

from pathlib import Path
from typing import Any

from engine.models.block_drafter.block_rows import is_causal_layer
from engine.models.target_families import check_aux_layers

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
# Keys with which drafts compute something else, the value that changes nothing, and why others are refused.
WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "attention_sink_bias": (False, "drafts here have no attention sinks"),
    "attention_value_scale": (1.0, "drafts here do not scale their values"),
    "input_embedding_scale": (1.0, "vLLM applies it to DFlash2 drafts, and SGLang never does"),
    "logit_scale": (1.0, "vLLM applies it, and SGLang does not"),
}
QWEN3_MAX_WINDOW_LAYERS = 28  # of Transformers' Qwen3Config


def check_without_effect(exported: dict[str, Any], nested: dict[str, Any], source: str | Path) -> None:
    """Raise ValueError for a key with which a server, or the draft's own trainer, computes something else."""
    for name, (only_value, reason) in WITHOUT_EFFECT.items():
        for value in (nested.get(name), exported.get(name)):
            if value is not None and value != only_value:
                raise ValueError(f"{source} has {name}={value!r}, but {reason}; use a draft that was trained without it")
    draft_vocab_size = exported.get("draft_vocab_size")
    if draft_vocab_size not in (None, exported["vocab_size"]):
        raise ValueError(
            f"{source} has draft_vocab_size={draft_vocab_size!r} and vocab_size={exported['vocab_size']}, but SGLang drafts "
            "from the target's whole head in any case; use a draft that was trained with the whole vocabulary"
        )


def require_numbers(exported: dict[str, Any], names: tuple[str, ...], source: str | Path) -> None:
    for name in names:
        if type(exported.get(name)) is not int:
            raise ValueError(f"{source} has {name}={exported.get(name)!r}; it must be a whole number")


def block_fact(exported: dict[str, Any], nested: dict[str, Any], name: str, source: str | Path) -> Any:
    """Return a fact that may stand in `dflash_config` or at the top.

    Raises ValueError if it is missing or stated twice with different values.
    """
    values = [place[name] for place in (nested, exported) if place.get(name) is not None]
    if not values:
        raise ValueError(f"{source} has no {name}, neither at the top nor in dflash_config; add it")
    if any(value != values[0] for value in values):
        raise ValueError(
            f"{source} states {name} twice, as {values[0]} in dflash_config and as {values[1]} at the top; correct one"
        )
    return values[0]


def checked_layers(layers: Any, num_target_layers: int | None, source: str | Path) -> int:
    """Return the number of the target's layers, or the smallest one that the auxiliary layers allow if it is not known.

    layers: `target_layer_ids`. Raises ValueError unless servers capture all of these layers, in this order.
    """
    if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
        raise ValueError(f"{source} has target_layer_ids={layers!r}; expected a list of layer numbers")
    count = num_target_layers or max(0, *layers) + 2
    try:
        check_aux_layers(tuple(layers), count)
    except ValueError as error:
        raise ValueError(
            f"{source} has target_layer_ids={layers} for a target of {count} layers; SGLang captures different layers in "
            f"ascending order from 0 to {count - 2} only, so use a draft that reads such layers"
        ) from error
    return count


def windows_of_layers(exported: dict[str, Any], nested: dict[str, Any], source: str | Path) -> tuple[int | None, ...]:
    """Return the sliding window of each layer; None = full attention.

    Raises ValueError if servers would not find the windows, or different ones.
    """
    kinds = _layer_kinds(exported)
    if len(kinds) != exported["num_hidden_layers"]:
        raise ValueError(f"{source} has {len(kinds)} layer_types for {exported['num_hidden_layers']} layers; give one each")
    unknown = sorted(set(kinds) - {FULL_ATTENTION, SLIDING_ATTENTION})
    if unknown:
        raise ValueError(f"{source} has layer_types {unknown}; use a draft with {FULL_ATTENTION} and {SLIDING_ATTENTION} only")
    at_the_top = "layer_types, sliding_window, use_sliding_window and is_causal at the top"
    if SLIDING_ATTENTION not in kinds:
        if nested.get("use_swa"):
            problem = f"{source} has use_swa in dflash_config, with which vLLM gives all layers a window and SGLang none"
            raise ValueError(f"{problem}; state the windows by {at_the_top}")
        return (None,) * len(kinds)
    window = exported.get("sliding_window")
    if not exported.get("use_sliding_window") or window is None:
        raise ValueError(
            f"{source} has sliding layers, but no sliding_window with use_sliding_window=true, without which servers drop the "
            "window; add both"
        )
    if nested.get("swa_window_size") not in (None, window):
        raise ValueError(
            f"{source} has swa_window_size={nested['swa_window_size']!r} in dflash_config, which vLLM reads, and "
            f"sliding_window={window!r} at the top, which SGLang reads; correct one"
        )
    return tuple(window if kind == SLIDING_ATTENTION else None for kind in kinds)


def _layer_kinds(exported: dict[str, Any]) -> list[str]:
    """Return the kind of attention of each layer; without `layer_types`, the kinds that Transformers' Qwen3Config fills in."""
    kinds = exported.get("layer_types")
    if kinds:
        return kinds
    count = exported["num_hidden_layers"]
    num_full = exported.get("max_window_layers", QWEN3_MAX_WINDOW_LAYERS) if exported.get("use_sliding_window") else count
    return [FULL_ATTENTION if layer < num_full else SLIDING_ATTENTION for layer in range(count)]


def causality(
    exported: dict[str, Any], nested: dict[str, Any], windows: tuple[int | None, ...], source: str | Path
) -> bool | None:
    """Return `is_causal` of a draft with these windows. Raises ValueError if servers would not agree on it."""
    is_causal = exported.get("is_causal")
    if is_causal not in (None, True, False):
        raise ValueError(f"{source} has is_causal={is_causal!r}; expected true or false")
    of_layers = {is_causal_layer(is_causal, window) for window in windows}
    named = nested.get("causal")
    if named is not None and of_layers != {named}:
        raise ValueError(
            f"{source} has causal={named!r} in dflash_config, which SGLang does not read, and is_causal={is_causal!r} at the "
            "top; state what the draft was trained with as is_causal at the top"
        )
    return one_causality(is_causal, windows)


def one_causality(is_causal: bool | None, windows: tuple[int | None, ...]) -> bool | None:
    """Return `is_causal`, with true or false in place of None if all layers are alike."""
    of_layers = {is_causal_layer(is_causal, window) for window in windows}
    return of_layers.pop() if len(of_layers) == 1 else is_causal
