"""What a family calls its linear maps: by usual names, by the plan that its config publishes, or as a user teaches.

A published plan says of a map only whether ranks take its outputs or its inputs. Which one is the query it does not say, so the
names that it has beside the usual ones are told by what they are made of.
"""

import re
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Names:
    """What a family calls its linear maps.

    queries, keys, values, outputs: of attention. latent_queries: instead of `queries` where both are there (MLA).
    latent_keys_values: keys and values of all heads. fused: queries, keys and values in one map, segment by segment, or head
    by head (`fused_by_head`). gates: of attention, some features a head. up, down: of MLPs; fused_up: gate and up in one.
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


# What a plan's styles make of a map in an MLP, and of a map in attention by its name without "proj" and the like.
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
    "inkling_text": Names(outputs=()),  # convolves keys and values, and places come in as a bias of the scores
    "zaya": Names(outputs=(), down=()),  # convolves the queries and keys of all heads together; its routers are MLPs
}


def register_family(model_type: str, names: Names) -> None:
    """Teach what a family calls its maps. model_type: of its text config."""
    _FAMILIES[model_type] = names


def names_of(config: PreTrainedConfig) -> Names:
    """As taught, else the usual ones and those that the config's `base_model_tp_plan` has beside them."""
    taught = _FAMILIES.get(config.model_type)
    plan = getattr(config, "base_model_tp_plan", None) or {}
    return _published(tuple(plan.items())) if taught is None else taught


@cache
def _published(plan: tuple[tuple[str, str], ...]) -> Names:
    """plan: names of maps, with numbers of layers as *, and their styles."""
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
