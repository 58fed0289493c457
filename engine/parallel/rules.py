"""Sharding rules for attention heads, MLPs, and experts (whole ones, or a slice of each).

The role of a map (query, gate, expert and so on) follows from its name (`names.py`). The numbers of
heads and segments follow from shapes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import getsource, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from engine.config.sections import divisors
from engine.parallel.mesh import Group
from engine.parallel.names import Names, names_of

QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")

PROOFS = Path(__file__).with_name("proofs.json")

Intervals = tuple[tuple[int, int], ...]


def proof_of(model_type: str) -> dict[str, Any] | None:
    """Return the result of tests/parallel/family_matrix.py for a family; None if not tested.

    Keys: `tp`, `ep`, `error`, and `reason` if the family cannot be shared, otherwise None.
    """
    return json.loads(PROOFS.read_text(encoding="utf-8")).get(model_type)


def check_proven(config: PreTrainedConfig) -> None:
    """Raise ValueError unless tests have shown that sharding a family keeps its results."""
    family = config.model_type
    proof = proof_of(config.model_type)
    if proof is None:
        fix = "add it to tests/parallel/family_matrix.py, or set parallel.allow_unverified=true"
        raise ValueError(f"target family {family!r} was not shown to give the same results when ranks share it; {fix}")
    if proof["reason"] is not None:
        raise ValueError(f"target family {family!r} cannot be shared: {proof['reason']}; set parallel.tp_size=1 and ep_size=1")


class Unshardable(Exception):
    """Raised for a module that no rule can share. The message is the reason."""


@dataclass(frozen=True)
class ShardSpec:
    """The part of a parameter that a rank holds: concatenated intervals along one dimension.

    zeros: whether the rank holds zeros instead. Only the first rank then holds the values, so that
    a bias is added once.
    """

    dim: int = 0
    intervals: Intervals = ()
    zeros: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        if self.zeros:
            return torch.zeros_like(tensor)
        return torch.cat([tensor.narrow(self.dim, start, stop - start) for start, stop in self.intervals], dim=self.dim)


def is_attention(module: nn.Module, names: Names) -> bool:
    """Return whether a module is softmax attention with maps of known names.

    It must call Transformers' attention interface.
    """
    children = dict(module.named_children())
    knows = [names.outputs, (*names.queries, *names.latent_queries, *names.fused)]
    if not getattr(module, "is_kv_shared_layer", False):  # uses an earlier layer's keys and values
        knows.append((*names.keys, *names.latent_keys_values, *names.fused))
    return all(any(name in children for name in some) for some in knows) and compares_pairs(module)


def compares_pairs(module: nn.Module) -> bool:
    """Return whether a module compares each query with each key, through Transformers' interface.

    Linear attention does not.
    """
    return _uses_interface(type(module).forward)


@lru_cache
def _uses_interface(forward: Any) -> bool:
    return "attention_interface" in getsource(forward)


def is_mlp(module: nn.Module, names: Names) -> bool:
    maps = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
    return bool(maps & {*names.up, *names.fused_up}) and bool(maps & set(names.down))


def holds_experts(module: nn.Module, names: Names) -> bool:
    """Return whether a module holds the stacked weights of several experts."""
    weights = dict(module.named_parameters(recurse=False))
    return "down_proj" in weights and any(
        weight.ndim == 3 and name in (*names.up, *names.fused_up) for name, weight in weights.items()
    )


def is_experts(module: nn.Module, names: Names) -> bool:
    """Return whether a module gives each of its experts only some of the tokens.

    Such a module is called with tokens sorted by expert, or with tokens and their choices and
    weights.
    """
    return holds_experts(module, names) and len(signature(module.forward).parameters) != 2


@dataclass(frozen=True)
class AttentionHeads:
    """Numbers of query and key heads of an attention module, and the heads that this rank holds.

    `queries` and `keys` are the local heads as intervals of head numbers. If there are fewer key
    heads than ranks, several ranks hold the same key head.
    Raises Unshardable if the ranks cannot share the heads. The message lists sizes that work.
    """

    num_queries: int
    num_keys: int
    tp: Group

    def __post_init__(self) -> None:
        queries = self.num_queries
        keys = self.num_keys
        fitting = [size for size in divisors(queries) if keys % size == 0 or size % keys == 0]
        if self.tp.size not in fitting:
            problem = f"{queries} heads and {keys} key/value heads cannot be shared by {self.tp.size} ranks"
            raise Unshardable(f"{problem}; use a parallel.tp_size of {fitting}")

    @classmethod
    def of(cls, module: nn.Module, config: PreTrainedConfig, tp: Group) -> "AttentionHeads":
        """Return the heads of a module, with numbers from the module, or else from the config."""
        queries = _count(module, QUERY_COUNTS, config, "num_attention_heads")
        keys = queries if any(hasattr(module, name) for name in names_of(config).latent_keys_values) else None
        return cls(queries, keys or _count(module, KEY_COUNTS, config, "num_key_value_heads"), tp)

    @property
    def queries(self) -> Intervals:
        return (part_of(self.num_queries, self.tp),)

    @property
    def keys(self) -> Intervals:
        if self.num_keys % self.tp.size == 0:
            return (part_of(self.num_keys, self.tp),)
        head = self.tp.rank * self.num_keys // self.tp.size
        return ((head, head + 1),)

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of local heads, by the name of the module attribute that holds them."""
        queries, keys = (sum(stop - start for start, stop in heads) for heads in (self.queries, self.keys))
        counts = dict.fromkeys(QUERY_COUNTS, queries) | dict.fromkeys(KEY_COUNTS, keys)
        return counts | {"num_key_value_groups": queries // keys}


def attention_cuts(module: nn.Module, heads: AttentionHeads, names: Names) -> tuple[dict[str, ShardSpec], list[str]]:
    """Return the cuts of an attention module by parameter name, and its norms over all heads.

    Raises Unshardable for a parameter that no rule covers.
    """
    children = dict(module.named_children())
    cuts: dict[str, ShardSpec] = {}
    norms: list[str] = []
    for name, child in children.items():
        if isinstance(child, nn.Linear):
            cut = _attention_map(name, child, children, heads, names)
            if cut is None and name in names.outputs:
                raise Unshardable(f"{name} reads {child.in_features} features, which {heads.num_queries} heads do not divide")
            if cut is not None:
                cuts |= {f"{name}.{leaf}": leaf_cut for leaf, leaf_cut in linear_cuts(child, cut, heads.tp).items()}
        weight = getattr(child, "weight", None)
        if "norm" in name and weight is not None:
            normed = children.get(names.queries[0] if name.startswith("q") else names.keys[0])
            own, count = (heads.queries, heads.num_queries) if name.startswith("q") else (heads.keys, heads.num_keys)
            if isinstance(normed, nn.Linear) and weight.shape == (normed.out_features,) and count > 1:
                cuts[f"{name}.weight"] = ShardSpec(0, scaled(own, normed.out_features // count))
                norms.append(name)
            elif weight.ndim == 2 and weight.shape[0] == count:
                cuts[f"{name}.weight"] = ShardSpec(0, own)
    indexer: Any = children.get("indexer")
    if hasattr(indexer, "block_size"):  # it chooses blocks of keys per key head
        if indexer.num_heads != heads.num_keys:
            raise Unshardable(f"its indexer chooses for {indexer.num_heads} heads, there are {heads.num_keys} key/value heads")
        cuts["indexer.q_proj.weight"] = ShardSpec(0, scaled(heads.keys, indexer.head_dim))
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.shape[0] != heads.num_queries:
            raise Unshardable(f"its parameter {leaf} of shape {list(parameter.shape)} is not one a head")
        cuts[leaf] = ShardSpec(0, heads.queries)
    return cuts, norms


def _attention_map(
    name: str, child: nn.Linear, siblings: dict[str, nn.Module], heads: AttentionHeads, names: Names
) -> ShardSpec | None:
    """Return the rows or columns of a linear map that this rank holds; None = all of it."""
    queries = heads.num_queries
    keys = heads.num_keys
    features = child.out_features
    if name in names.outputs:
        return ShardSpec(1, scaled(heads.queries, child.in_features // queries)) if child.in_features % queries == 0 else None
    is_query = name in names.queries and not any(latent in siblings for latent in names.latent_queries)
    of_all_heads = is_query or name in (*names.latent_queries, *names.latent_keys_values)
    if of_all_heads or (name in names.gates and features % queries == 0) or (name in names.fused and names.fused_by_head):
        return ShardSpec(0, scaled(heads.queries, features // queries))
    if name in (*names.keys, *names.values):
        return ShardSpec(0, scaled(heads.keys, features // keys))
    if name in names.fused:
        unit = features // (queries + 2 * keys)
        offsets = ((heads.queries, 0), (heads.keys, queries), (heads.keys, queries + keys))
        return ShardSpec(0, tuple(((start + at) * unit, (stop + at) * unit) for own, at in offsets for start, stop in own))
    return None


def mlp_cuts(module: nn.Module, tp: Group, names: Names) -> dict[str, ShardSpec]:
    """Return the cuts of an MLP by parameter name.

    Raises Unshardable if the width cannot be shared.
    """
    cuts: dict[str, ShardSpec] = {}
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear) or name not in (*names.up, *names.fused_up, *names.down):
            continue
        if name in names.down:
            cut = ShardSpec(1, _segments(child.in_features, 1, tp))
        else:
            cut = ShardSpec(0, _segments(child.out_features, 2 if name in names.fused_up else 1, tp))
        cuts |= {f"{name}.{leaf}": leaf_cut for leaf, leaf_cut in linear_cuts(child, cut, tp).items()}
    return cuts


def expert_cuts(module: nn.Module, num_experts: int, ep: Group) -> dict[str, ShardSpec]:
    """Return cuts that keep an equal number of whole experts per rank, by parameter name.

    Raises Unshardable if `num_experts` is not divisible by the number of ranks.
    """
    if num_experts % ep.size:
        raise Unshardable(f"{num_experts} experts cannot be shared by {ep.size} ranks; use one of {divisors(num_experts)}")
    own = (part_of(num_experts, ep),)
    # A parameter may have more rows than experts: rows of identity experts, after the others.
    weights = module.named_parameters(recurse=False)
    return {name: ShardSpec(0, own) for name, weight in weights if weight.shape[0] >= num_experts}


def expert_slices(module: nn.Module, hidden_size: int, tp: Group, names: Names) -> dict[str, ShardSpec]:
    """Return cuts that keep a slice of every expert's width, by parameter name.

    The up and gate maps are cut by outputs, the down map by inputs. Only the first rank adds the
    bias of the down map. Raises Unshardable if the width cannot be shared.
    """
    weights = dict(module.named_parameters(recurse=False))
    cuts: dict[str, ShardSpec] = {}
    down = weights["down_proj"]
    transposed = getattr(module, "is_transposed", down.shape[2] == hidden_size and down.shape[1] != hidden_size)
    interleaved = not getattr(module, "is_concatenated", True)
    for name, weight in weights.items():
        stem = name.removesuffix("_bias")
        is_bias = stem != name
        if stem != "down_proj":
            dim = weight.ndim - 1 if transposed or is_bias else 1
            cuts[name] = ShardSpec(
                dim, _segments(weight.shape[dim], 2 if stem in names.fused_up and not interleaved else 1, tp)
            )
        elif not is_bias:
            dim = 1 if transposed else 2
            cuts[name] = ShardSpec(dim, _segments(weight.shape[dim], 1, tp))
        elif tp.rank:
            cuts[name] = ShardSpec(zeros=True)
    return cuts


def linear_cuts(linear: nn.Linear, cut: ShardSpec, tp: Group) -> dict[str, ShardSpec]:
    """Return the cuts of a linear map's weight and bias.

    If the weight is cut by columns, only the first rank adds the bias.
    """
    cuts = {"weight": cut}
    if linear.bias is not None and cut.dim == 0:
        cuts["bias"] = cut
    elif linear.bias is not None and tp.rank:
        cuts["bias"] = ShardSpec(zeros=True)
    return cuts


def part_of(total: int, group: Group) -> tuple[int, int]:
    """Return the start and end of this rank's part of `total`, which the group's size divides."""
    size = total // group.size
    return group.rank * size, (group.rank + 1) * size


def part_of_rows(total: int, group: Group) -> tuple[int, int]:
    """Return the start and end of this rank's rows of a vocabulary.

    The group's size need not divide `total`; numbers of rows differ by at most one between ranks.
    """
    return total * group.rank // group.size, total * (group.rank + 1) // group.size


def scaled(intervals: Intervals, unit: int) -> Intervals:
    return tuple((start * unit, stop * unit) for start, stop in intervals)


def _segments(total: int, count: int, tp: Group) -> Intervals:
    """Return this rank's part of each of `count` equal segments of `total` features."""
    size = total // count
    if size % tp.size:
        raise Unshardable(
            f"a width of {size} cannot be shared by {tp.size} ranks; use a parallel.tp_size of {divisors(size)[:9]}"
        )
    start, stop = part_of(size, tp)
    return tuple((start + at * size, stop + at * size) for at in range(count))


def _count(module: nn.Module, names: Sequence[str], config: PreTrainedConfig, field: str) -> int:
    own = next((value for name in names if isinstance(value := getattr(module, name, None), int)), None)
    if own is not None:
        return own
    if field == "num_key_value_heads" and isinstance(groups := getattr(module, "num_key_value_groups", None), int):
        return _count(module, QUERY_COUNTS, config, "num_attention_heads") // groups
    value = getattr(config, field, None)
    return _count(module, QUERY_COUNTS, config, "num_attention_heads") if value is None else value
