"""Shards of linear-attention and state-space mixers: some value heads and their key heads.

Such mixers pack their features in more ways than attention does. A `Kind` therefore describes the
features of each map by a string of segments: `k` has features of every key head, `v` features of
every value head, and `1` one number per value head. In brackets, the segments are interleaved by
key head. Widths are read from shapes. Mamba 1 has no kind, because it contains a product over all
of its channels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor, nn

from engine.parallel.mesh import Group
from engine.parallel.rules import AttentionHeads, Intervals, ShardSpec, Unshardable, linear_cuts, scaled

OUTPUTS = ("o_proj", "out_proj")
OF_KEYS = ("num_k_heads", "n_groups", "key_dim")
OF_VALUES = ("num_v_heads", "num_heads", "num_attention_heads", "value_dim", "qkv_dim", "intermediate_size")
NORM = "norm"
CONVOLUTION = "conv1d"
WHOLE = ""


@dataclass(frozen=True)
class Kind:
    """A structure that the mixers of several families have in common.

    keys, values: paths of the attributes with the number of key heads and of value heads.
    mark: a map or parameter that other kinds do not have.
    features: segments of each map and parameter, except the output map. A mixer with any other
    parameter or buffer is not of this kind.
    """

    keys: str
    values: str
    mark: str
    features: Mapping[str, str]

    def fits(self, mixer: nn.Module) -> bool:
        stems = {_stem(name) for name, _ in _tensors(mixer)}
        knows = self.mark in stems and stems & {*OUTPUTS} and stems <= {*self.features, *OUTPUTS}
        return bool(knows) and _has(mixer, self.keys) and _has(mixer, self.values)


_DELTA = {
    "in_proj_qkvz": "(kkvv)",
    "in_proj_ba": "(11)",
    "in_proj_qkv": "kkv",
    "q_proj": "k",
    "k_proj": "k",
    "v_proj": "v",
    CONVOLUTION: "kkv",
    "o_norm": WHOLE,  # all heads use the same weight
    "b_proj": "1",
    "g_proj": "v",
}
KINDS = (
    Kind(  # Qwen3-Next, Qwen3.5, OLMo Hybrid
        "num_k_heads",
        "num_v_heads",
        "A_log",
        _DELTA
        | {"in_proj_z": "v", "in_proj_b": "1", "in_proj_a": "1", "a_proj": "1"}
        | {"A_log": "1", "dt_bias": "1", NORM: WHOLE},
    ),
    Kind(  # Kimi Linear, Bailing: a decay for each feature
        "num_heads",
        "num_heads",
        "forget_gate.A_log",
        _DELTA
        | {"g_a_proj": WHOLE, "g_b_proj": "v", "forget_gate.f_a_proj": WHOLE, "forget_gate.f_b_proj": "v"}
        | {"forget_gate.f_proj": "v", "forget_gate.A_log": "1", "forget_gate.dt_bias": "v"},
    ),
    Kind(  # MiniMax: its decays are buffers
        "num_attention_heads",
        "num_attention_heads",
        "slope_rate",
        {"qkv_proj": "(vvv)", "output_gate": "v", NORM: "v"}
        | dict.fromkeys(("slope_rate", "query_decay", "key_decay", "diagonal_decay"), "1"),
    ),
    Kind(  # Mamba 2; the groups that share B and C are its key heads
        "n_groups",
        "num_heads",
        "A_log",
        {"in_proj": "vvkk1", CONVOLUTION: "vkk", NORM: "v", "A_log": "1", "D": "1", "dt_bias": "1"},
    ),
    Kind("conv.in_channels", "conv.in_channels", "conv", {"in_proj": "vvv", "conv": "v"}),  # LFM2: separate channels
)


@dataclass(frozen=True)
class LinearPart:
    """The part of a mixer that a rank holds.

    cuts: by name of the parameter or buffer.
    counts: attributes to set, by name of the submodule.
    norm: name of a norm with feature groups that span several ranks, and its number of groups; None
    if there is no such norm.
    """

    cuts: dict[str, ShardSpec]
    counts: dict[str, dict[str, int]]
    norm: tuple[str, int] | None


def kind_of(mixer: nn.Module) -> Kind | None:
    """Return the kind of a mixer, or None if the module is not a mixer of a known kind."""
    return next((kind for kind in KINDS if kind.fits(mixer)), None)


def linear_part(mixer: nn.Module, kind: Kind, tp: Group) -> LinearPart:
    """Return the part of a mixer that this rank holds.

    Raises Unshardable if the ranks cannot share its heads (the message lists sizes that work), or
    if its shapes do not match its kind.
    """
    heads = AttentionHeads(attrgetter(kind.values)(mixer), attrgetter(kind.keys)(mixer), tp)
    output_name = next(name for name in OUTPUTS if hasattr(mixer, name))
    output = getattr(mixer, output_name)
    norm = _shared_norm(mixer, kind, tp)
    if norm is not None and output.bias is not None:
        raise Unshardable(f"{output_name} adds a bias after a norm over heads of several ranks")
    width = output.in_features // heads.num_queries
    reads = ShardSpec(1, scaled(heads.queries, width))
    cuts = {f"{output_name}.{leaf}": cut for leaf, cut in linear_cuts(output, reads, tp).items()}
    for name, tensor in _tensors(mixer):
        if features := kind.features.get(_stem(name)):
            dim = next(dim for dim, size in enumerate(tensor.shape) if size > 1)
            cuts[name] = ShardSpec(dim, _own_features(name, features, tensor.shape[dim], width, heads))
    counts = {name: _own_counts(module, heads) for name, module in mixer.named_modules()}
    if hasattr(mixer, "conv_dim"):
        counts[""]["conv_dim"] = _size(cuts[f"{CONVOLUTION}.weight"])
    if norm is not None and hasattr(getattr(mixer, NORM), "group_size"):
        counts[NORM]["group_size"] = _size(cuts[f"{NORM}.weight"])
    return LinearPart(cuts, {name: own for name, own in counts.items() if own}, norm)


def _shared_norm(mixer: nn.Module, kind: Kind, tp: Group) -> tuple[str, int] | None:
    if not kind.features.get(NORM):
        return None
    norm = getattr(mixer, NORM)
    num_groups = norm.weight.numel() // getattr(norm, "group_size", norm.weight.numel())
    return None if num_groups % tp.size == 0 else (NORM, num_groups)


def _own_counts(module: nn.Module, heads: AttentionHeads) -> dict[str, int]:
    """Return a module's attributes with numbers and widths of heads, for the local heads only."""
    kinds = ((OF_KEYS, heads.counts["num_kv_heads"], heads.num_keys), (OF_VALUES, heads.counts["num_heads"], heads.num_queries))
    return {
        name: whole * own // count
        for names, own, count in kinds
        for name in names
        if isinstance(whole := getattr(module, name, None), int)
    }


def _own_features(name: str, features: str, total: int, width: int, heads: AttentionHeads) -> Intervals:
    """Return the intervals of the local heads' features among all `total` features.

    width: features of a value head. The width of a key head follows from `total`.
    Raises Unshardable if `total` does not match the segments.
    """
    kinds = features.strip("()")
    units = _features_per_head(name, kinds, total, width, heads)
    num_groups = heads.num_keys if features.startswith("(") else 1
    found: list[tuple[int, int]] = []
    offset = 0
    for group in range(num_groups):
        for kind in kinds:
            num_heads = heads.num_keys if kind == "k" else heads.num_queries
            ((first, end),) = heads.keys if kind == "k" else heads.queries
            count = num_heads // num_groups  # heads of a segment
            start = offset + _clipped(first - group * count, count) * units[kind]
            stop = offset + _clipped(end - group * count, count) * units[kind]
            if start < stop:
                found.append((start, stop))
            offset += count * units[kind]
    return _merged(found)


def _features_per_head(name: str, kinds: str, total: int, width: int, heads: AttentionHeads) -> dict[str, int]:
    """Return the features per head of each kind of segment. Raises Unshardable as `_own_features` does."""
    units = {"v": width, "1": 1}
    num_keyed = kinds.count("k") * heads.num_keys
    of_values = heads.num_queries * sum(units.get(kind, 0) for kind in kinds)
    rest = total - of_values
    units["k"] = rest // num_keyed if num_keyed else 0
    if rest != num_keyed * units["k"] or rest < 0:
        raise Unshardable(f"{name} has {total} features, not those that {heads.num_queries} heads of {width} have")
    return units


def _clipped(head: int, count: int) -> int:
    return min(max(head, 0), count)


def _merged(intervals: list[tuple[int, int]]) -> Intervals:
    """Join adjacent intervals, which are then read as one slice."""
    merged: list[tuple[int, int]] = []
    for start, stop in intervals:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return tuple(merged)


def _tensors(mixer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from mixer.named_parameters()
    yield from mixer.named_buffers()


def _stem(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _has(mixer: nn.Module, path: str) -> bool:
    first, _, rest = path.partition(".")
    return hasattr(mixer, first) and (not rest or hasattr(getattr(mixer, first), rest))


def _size(cut: ShardSpec) -> int:
    return sum(stop - start for start, stop in cut.intervals)
