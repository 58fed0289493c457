"""Plan of a target that ranks share: which weights are cut, and which modules exchange tokens.

A module that no rule of `rules.py` or `linear_attention.py` fits stays replicated and runs on local
tokens. The plan records the reason.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import signature

from torch import nn
from transformers import PreTrainedModel

from engine.parallel.blocks import by_document, keep_own, share, share_rows
from engine.parallel.experts import dispatch, dispatch_dense, keep_identities, num_identities
from engine.parallel.linear_attention import LinearPart, kind_of, linear_part
from engine.parallel.mesh import Group, TargetMesh
from engine.parallel.names import names_of
from engine.parallel.norms import norm_late, norm_over
from engine.parallel.rules import (
    AttentionHeads,
    ShardSpec,
    Unshardable,
    attention_cuts,
    expert_cuts,
    expert_slices,
    holds_experts,
    is_attention,
    is_experts,
    is_mlp,
    mlp_cuts,
    part_of_rows,
)

EXPERT_COUNTS = ("num_experts", "num_routed_experts")
MIXER_ARGUMENTS = {"attention_mask", "position_embeddings", "position_ids", "past_key_values", "cache_params"}


@dataclass
class TargetPlan:
    """How a decoder is divided between ranks, by the names of its parameters and modules.

    cuts: the part of each parameter or buffer that this rank holds; others are held whole.
    shared: modules that run on all ranks' tokens.
    experts: modules that tokens are dispatched to, with the number of experts of all ranks.
    norms: norms over features that are sharded.
    late_norms: by mixer, the norm that is corrected after the mixer, and its number of groups.
    counts: by module, attributes to set.
    heads: by attention module, the numbers of local query heads and key heads.
    linear: linear-attention mixers that ranks share.
    replicated: modules that might have been shared, and why they are not.
    embedding: name of the token embedding, if ranks share its rows.
    """

    cuts: dict[str, ShardSpec] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    late_norms: dict[str, tuple[str, int]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    heads: dict[str, tuple[int, int]] = field(default_factory=dict)
    linear: list[str] = field(default_factory=list)
    replicated: dict[str, str] = field(default_factory=dict)
    embedding: str | None = None

    @classmethod
    def of(cls, decoder: PreTrainedModel, mesh: TargetMesh) -> "TargetPlan":
        """Return the plan of a decoder with whole weights, which may be on the meta device."""
        plan = cls()
        stacks = tuple(f"{name}." for name, child in decoder.named_children() if isinstance(child, nn.ModuleList))
        for name, module in decoder.named_modules():
            if not name.startswith(stacks) or any(name.startswith(f"{done}.") for done in plan.shared):
                continue
            try:
                plan._add(decoder, name, module, mesh)
            except Unshardable as error:
                plan.replicated[name] = str(error)
        plan._add_embedding(decoder, mesh.tp)
        for name, module in _mixers(decoder) if mesh.tp.size > 1 else ():
            if name not in plan.shared:
                plan.replicated.setdefault(name, f"no rule shares a {type(module).__name__}")
        return plan

    def summary(self, mesh: TargetMesh) -> list[str]:
        """Return log lines on the modules that ranks share, and on replicated ones with reasons."""
        if mesh.size == 1:
            return []
        lines = [
            f"shared by {mesh.tp.size} ranks: {len(self.shared)} modules, {len(self.heads)} of them attention, "
            f"{len(self.linear)} linear attention; experts of {len(self.experts)} layers by {mesh.ep.size}"
        ]
        reasons = Counter(self.replicated.values())
        return lines + [f"{count} modules on every rank: {reason}" for reason, count in reasons.most_common()]

    def _add_embedding(self, decoder: PreTrainedModel, tp: Group) -> None:
        table = decoder.get_input_embeddings()
        if tp.size > 1 and isinstance(table, nn.Embedding):
            self.embedding = next(name for name, module in decoder.named_modules() if module is table)
            self.cuts[f"{self.embedding}.weight"] = ShardSpec(0, (part_of_rows(table.num_embeddings, tp),))

    def _add(self, decoder: PreTrainedModel, name: str, module: nn.Module, mesh: TargetMesh) -> None:
        names = names_of(decoder.config)
        cuts: dict[str, ShardSpec] = {}
        if is_experts(module, names):
            self._add_experts(decoder, name, module, mesh)
        elif mesh.tp.size > 1 and is_attention(module, names):
            heads = AttentionHeads.of(module, decoder.config, mesh.tp)
            cuts, norms = attention_cuts(module, heads, names)
            self.norms += [f"{name}.{norm}" for norm in norms]
            self.counts[name] = {key: n for key, n in heads.counts.items() if isinstance(getattr(module, key, None), int)}
            self.heads[name] = heads.counts["num_heads"], heads.counts["num_kv_heads"]
            if "indexer.q_proj.weight" in cuts:
                self.counts[f"{name}.indexer"] = {"num_heads": heads.counts["num_kv_heads"]}
            self.shared.append(name)
        elif mesh.tp.size > 1 and (kind := kind_of(module)) is not None:
            cuts = self._add_linear(name, linear_part(module, kind, mesh.tp))
        elif mesh.tp.size > 1 and is_mlp(module, names):
            if ".experts." in name:
                raise Unshardable("it is called with an expert's tokens alone")
            cuts = mlp_cuts(module, mesh.tp, names)
            self.shared.append(name)
        elif mesh.tp.size > 1 and holds_experts(module, names):
            raise Unshardable("all of its experts are given every token")
        self.cuts |= {f"{name}.{leaf}": cut for leaf, cut in cuts.items()}

    def _add_linear(self, name: str, part: LinearPart) -> dict[str, ShardSpec]:
        self.counts |= {f"{name}.{inner}".rstrip("."): counts for inner, counts in part.counts.items()}
        if part.norm is not None:
            self.late_norms[name] = part.norm
        self.linear.append(name)
        self.shared.append(name)
        return part.cuts

    def _add_experts(self, decoder: PreTrainedModel, name: str, module: nn.Module, mesh: TargetMesh) -> None:
        takes_choices = _takes_choices(module)
        if mesh.ep.size > 1:
            num_experts = module.get_parameter("down_proj").shape[0]
            cuts = expert_cuts(module, num_experts, mesh.ep)
            self.experts[name] = num_experts
            self.counts[name] = {key: num_experts // mesh.ep.size for key in EXPERT_COUNTS if hasattr(module, key)}
        elif mesh.tp.size > 1:
            cuts = expert_slices(module, decoder.config.hidden_size, mesh.tp, names_of(decoder.config))
            if takes_choices:
                self.shared.append(name)
            else:  # their inputs are already sorted by expert, so the whole block is shared
                self._add_block(decoder, name.rpartition(".")[0], mesh)
        else:
            return
        self.cuts |= {f"{name}.{leaf}": cut for leaf, cut in cuts.items()}

    def _add_block(self, decoder: PreTrainedModel, name: str, mesh: TargetMesh) -> None:
        names = names_of(decoder.config)
        for child_name, child in decoder.get_submodule(name).named_children():
            if is_mlp(child, names):
                self.cuts |= {f"{name}.{child_name}.{leaf}": cut for leaf, cut in mlp_cuts(child, mesh.tp, names).items()}
        self.shared.append(name)


def cut_decoder(decoder: PreTrainedModel, mesh: TargetMesh) -> TargetPlan:
    """Replace a decoder's whole weights by this rank's part; call `let_exchange` afterwards."""
    plan = TargetPlan.of(decoder, mesh)
    modules = dict(decoder.named_modules())
    for name, cut in plan.cuts.items():
        owner, _, leaf = name.rpartition(".")
        own = cut.of(getattr(modules[owner], leaf).data).clone()
        if leaf in modules[owner]._parameters:
            modules[owner]._parameters[leaf] = nn.Parameter(own, requires_grad=False)
        else:
            modules[owner]._buffers[leaf] = own
    return plan


def let_exchange(decoder: PreTrainedModel, plan: TargetPlan, mesh: TargetMesh, packs: bool) -> None:
    """Let the modules of a decoder with cut weights exchange tokens between ranks.

    packs: whether mixers can process several documents in one forward; otherwise they run document
    by document.
    """
    modules = dict(decoder.named_modules())
    names = names_of(decoder.config)
    for name, attributes in plan.counts.items():
        for attribute, value in attributes.items():
            setattr(modules[name], attribute, value)
        if name in plan.heads and any(fused in dict(modules[name].named_children()) for fused in names.fused):
            # Modules with fused maps read the numbers of heads from their config.
            modules[name].config = config = copy.copy(modules[name].config)
            config.num_attention_heads, config.num_key_value_heads = plan.heads[name]
    if plan.embedding is not None:
        share_rows(modules[plan.embedding], mesh.tp)
    for name in plan.norms:
        norm_over(modules[name], mesh.tp)
    for name, num_experts in plan.experts.items():
        if _takes_choices(modules[name]):
            dispatch(modules[name], num_experts, mesh.ep, mesh.parts, mesh.fp8_exchange)
        else:
            dispatch_dense(modules[name.rpartition(".")[0]], num_experts, mesh.ep, mesh.parts, mesh.fp8_exchange)
    for name, module in _mixers(decoder):
        if not packs:
            by_document(module, shared=name in plan.shared)
        if name not in plan.shared:
            keep_own(module)
    for name, (norm, num_groups) in plan.late_norms.items():
        norm_late(modules[name], norm, num_groups, mesh.tp)
    for name in plan.shared:
        share(modules[name], mesh.tp, is_experts(modules[name], names), mesh.parts)
    for name in (*plan.experts, *plan.shared):
        if num_identities(modules[name]):
            keep_identities(modules[name], plan.experts.get(name, modules[name].down_proj.shape[0]))
    for name, module in decoder.named_children():
        if not packs and name.endswith("rotary_emb"):
            by_document(module, shared=True)


def _takes_choices(experts: nn.Module) -> bool:
    """Return whether experts are called with tokens and their choices and weights.

    Otherwise they are called with tokens sorted by expert.
    """
    return len(signature(experts.forward).parameters) > 1


def _mixers(decoder: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of decoder layers that mix tokens, such as attention, with their names."""
    for name, part in parts_of_layers(decoder):
        if MIXER_ARGUMENTS & signature(part.forward).parameters.keys():
            yield name, part


def parts_of_layers(decoder: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of decoder layers with their names; lists yield their items."""
    for stack_name, stack in decoder.named_children():
        for place, layer in stack.named_children() if isinstance(stack, nn.ModuleList) else ():
            for name, child in layer.named_children():
                several = child.named_children() if isinstance(child, nn.ModuleList) else ()
                yield from ((f"{stack_name}.{place}.{name}.{number}", part) for number, part in several)
                if not isinstance(child, nn.ModuleList):
                    yield f"{stack_name}.{place}.{name}", child
