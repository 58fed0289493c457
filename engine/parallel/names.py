"""Names of a family's linear maps: common, published in its config, or registered by a user.

A published plan states only whether a map is sharded by its outputs or by its inputs, not whether
it computes queries, keys or values. This is inferred from the names in the plan that are not common
ones.
"""

import re
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Names:
    """Names of a family's linear maps, by role.

    queries, keys, values, outputs: maps of attention.
    latent_queries: used instead of `queries` if a module has both (MLA).
    latent_keys_values: one map for the keys and values of all heads (MLA).
    fused: one map for queries, keys and values, by segment, or by head if `fused_by_head`.
    gates: gates of attention, with the same number of features per head.
    up, down: maps of MLPs.
    fused_up: one map for gate and up.
    """

    queries: tuple[str, ...] = ("q_proj",)
    keys: tuple[str, ...] = ("k_proj",)
    values: tuple[str, ...] = ("v_proj",)
    latent_queries: tuple[str, ...] = ("q_b_proj",)
    latent_keys_values: tuple[str, ...] = ("kv_b_proj",)
    fused: tuple[str, ...] = ("qkv_proj", "query_key_value")
    fused_by_head: bool = False
    outputs: tuple[str, ...] = ("o_proj", "out_proj", "dense")
    gates: tuple[str, ...] = ("gate_proj", "g_proj")
    up: tuple[str, ...] = ("gate_proj", "up_proj", "fc1", "c_fc", "dense_h_to_4h")
    fused_up: tuple[str, ...] = ("gate_up_proj", "input_linear")
    down: tuple[str, ...] = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "output_linear")


# Roles of maps by their style in a published plan. In attention the role also depends on the name
# of the map, without affixes such as "proj".
_OF_MLP = {"colwise": "up", "packed_colwise": "fused_up", "rowwise": "down"}
_OF_ATTENTION = {
    ("colwise", "q"): "queries",
    ("colwise", "query"): "queries",
    ("colwise", "k"): "keys",
    ("colwise", "key"): "keys",
    ("colwise", "v"): "values",
    ("colwise", "value"): "values",
    ("colwise", "qkv"): "fused",
    ("packed_colwise", "qkv"): "fused",
    ("rowwise", "o"): "outputs",
    ("rowwise", "out"): "outputs",
    ("rowwise", "output"): "outputs",
}
_MLP = re.compile("mlp|ffn|feed|expert|moe")
_DECORATION = re.compile(r"^w_?|_?(proj|projection|linear|layer|w)$")

_FAMILIES = {
    "gpt_neox": Names(fused_by_head=True),
    "inkling_text": Names(outputs=()),  # convolves keys and values; positions bias the scores
    "zaya": Names(outputs=(), down=()),  # convolves queries and keys across heads; routers are MLPs
}


def register_family(model_type: str, names: Names) -> None:
    """Register the names of a family's linear maps. model_type: `model_type` of its text config."""
    _FAMILIES[model_type] = names


def names_of(config: PreTrainedConfig) -> Names:
    """Return the registered names of a config's family.

    If there are none, return the common names and those that the config's `base_model_tp_plan`
    adds.
    """
    taught = _FAMILIES.get(config.model_type)
    plan = getattr(config, "base_model_tp_plan", None) or {}
    return _published(tuple(plan.items())) if taught is None else taught


@cache
def _published(plan: tuple[tuple[str, str], ...]) -> Names:
    """Return the common names and those that a published plan adds.

    plan: pairs of a map's name, with * for the number of the layer, and its style.
    """
    names = Names()
    usual = {name for field in astuple(names) if isinstance(field, tuple) for name in field}
    for pattern, style in plan:
        parent, _, name = pattern.rpartition(".")
        block = parent.rpartition(".")[2]
        field = None
        if "att" in block:
            field = _OF_ATTENTION.get((style, _DECORATION.sub("", name)))
        elif _MLP.search(block):
            field = _OF_MLP.get(style)
        if field is not None and name not in (*usual, *getattr(names, field)):
            changed: dict[str, Any] = {field: (*getattr(names, field), name)}
            names = replace(names, **changed)
    return names
