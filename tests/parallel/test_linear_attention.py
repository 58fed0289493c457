"""Mixers whose heads ranks share give together what a whole one gives; see family_matrix.py for whole families."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import engine.parallel.plan as plan_file
from engine.parallel.linear_attention import KINDS, Kind, LinearPart, kind_of, linear_part
from engine.parallel.mesh import Group, TargetMesh
from engine.parallel.rules import Unshardable
from engine.target.structure import decoder_of
from tests.collectives import CountCollectives
from tests.distributed import run_ranks
from tests.parallel.families import HIDDEN, tiny_config, tiny_model
from tests.parallel.family_matrix import LENGTHS, RANKS, TOLERANCE, in_step, reference, relative, run_own, shared

WITH_OWN_NORMS = ["qwen3_next", "qwen3_5_text", "kimi_linear", "bailing_hybrid", "olmo_hybrid", "lfm2_moe"]
FAMILIES = [*WITH_OWN_NORMS, "minimax", "nemotron_h", "granitemoehybrid"]
UNEVEN = {  # widths of keys and values that differ, and several value heads a key head
    "qwen3_next": dict(linear_key_head_dim=4, linear_num_value_heads=8),
    "qwen3_5_text": dict(linear_key_head_dim=4, linear_num_value_heads=8),
    "olmo_hybrid": dict(linear_key_head_dim=4, linear_num_value_heads=8),
}


def mixers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in decoder_of(model).named_modules() if kind_of(module) is not None)


def uneven_mixer(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config(family)
    for name, value in UNEVEN.get(family, {}).items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _, mixer = next(mixers(model))
    for parameter in mixer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return mixer.requires_grad_(False)


def part_of_mixer(mixer: nn.Module, part: LinearPart) -> nn.Module:
    """What a rank runs."""
    own = copy.deepcopy(mixer)
    for name, cut in part.cuts.items():
        owner, _, leaf = name.rpartition(".")
        holder = own.get_submodule(owner)
        tensors = holder._parameters if leaf in holder._parameters else holder._buffers
        tensors[leaf] = cut.of(tensors[leaf])
    for name, counts in part.counts.items():
        for attribute, value in counts.items():
            setattr(own.get_submodule(name), attribute, value)
    return own


def error_of_parts(mixer: nn.Module, kind: Kind, tp_size: int) -> float:
    parts = [linear_part(mixer, kind, Group(tp_size, rank)) for rank in range(tp_size)]
    hidden_1TD = torch.randn(1, 11, HIDDEN)
    together = sum(part_of_mixer(mixer, part)(hidden_1TD) for part in parts)
    return relative([together], [mixer(hidden_1TD)])


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("family", WITH_OWN_NORMS)
def test_results_of_all_parts_add_up_to_that_of_the_whole(family, tp_size):
    mixer = uneven_mixer(family)
    assert error_of_parts(mixer, kind_of(mixer), tp_size) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "name", "features"),
    [
        ("qwen3_next", "in_proj_qkvz", "kkvv"),
        ("qwen3_next", "in_proj_ba", "11"),
        ("qwen3_5_text", "in_proj_qkv", "(kkv)"),
        ("qwen3_5_text", "conv1d", "vkk"),
        ("kimi_linear", "conv1d", "(kkv)"),
        ("lfm2_moe", "in_proj", "(vvv)"),
    ],
)
def test_maps_that_are_cut_as_if_packed_otherwise_give_another_result(family, name, features):
    mixer = uneven_mixer(family)
    kind = kind_of(mixer)
    wrong = replace(kind, features={**kind.features, name: features})
    assert error_of_parts(mixer, wrong, 2) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_holds_its_share_of_every_mixer(family):
    found = 0
    for _, mixer in mixers(tiny_model(family)):
        parts = [linear_part(mixer, kind_of(mixer), Group(2, rank)) for rank in range(2)]
        found = found + 1
        tensors = dict(mixer.named_parameters()) | dict(mixer.named_buffers())
        held = 0
        for name, tensor in tensors.items():
            cut = parts[0].cuts.get(name)
            held += tensor.numel() if cut is None else cut.of(tensor).numel()
            rows = [set(), set()]
            for own, part in zip(rows, parts, strict=True):
                for start, stop in part.cuts[name].intervals if cut is not None else ():
                    own.update(range(start, stop))
            assert cut is None or rows[0] | rows[1] == set(range(tensor.shape[cut.dim])), name
            assert family == "granitemoehybrid" or not rows[0] & rows[1], name  # it has one group of keys
        assert held < 0.6 * sum(tensor.numel() for tensor in tensors.values())
    assert found


def test_heads_of_a_key_lie_together_and_keys_fewer_than_ranks_are_held_by_several():
    mixer = uneven_mixer("qwen3_next")  # two key heads of 4, each with four value heads of 8
    cuts = [linear_part(mixer, kind_of(mixer), Group(4, rank)) for rank in range(4)]
    assert cuts[1].cuts["in_proj_qkvz.weight"].intervals == ((0, 8), (24, 40), (56, 72))
    assert cuts[1].cuts["in_proj_ba.weight"].intervals == ((2, 4), (6, 8))
    assert cuts[2].cuts["conv1d.weight"].intervals == ((4, 8), (12, 16), (48, 64))
    assert cuts[1].counts == {"": dict(num_k_heads=1, key_dim=4, num_v_heads=2, value_dim=16, conv_dim=24)}


def test_sizes_that_would_do_are_named():
    mixer = uneven_mixer("qwen3_next")
    with pytest.raises(Unshardable, match=r"8 heads and 2 key/value heads cannot be shared by 3 ranks; use .* \[1, 2, 4, 8\]"):
        linear_part(mixer, kind_of(mixer), Group(3, 0))


def test_a_mixer_with_a_map_that_no_kind_has_is_left_alone():
    _, mixer = next(mixers(tiny_model("qwen3_next")))
    assert kind_of(mixer) is KINDS[0]
    mixer.more = nn.Linear(4, 4)
    assert kind_of(mixer) is None
    assert not list(mixers(tiny_model("jamba"))) and not list(mixers(tiny_model("llama")))


def test_a_map_of_another_width_is_refused():
    _, mixer = next(mixers(tiny_model("qwen3_next")))
    mixer.in_proj_qkvz = nn.Linear(32, 95)
    with pytest.raises(Unshardable, match="in_proj_qkvz.weight has 95 features"):
        linear_part(mixer, kind_of(mixer), Group(2, 0))


def error_of_four(world, family: str) -> float:
    torch.set_num_threads(1)
    found, target = in_step(world, lambda: shared(family, world.rank, TargetMesh.make(world, 4, 1)))
    assert target.plan.linear
    return relative(found, reference(family, world.rank))


@pytest.mark.parametrize("family", ["qwen3_next", "minimax", "nemotron_h", "granitemoehybrid"])
def test_four_ranks_share_mixers_of_few_key_heads_and_of_norms_over_all(family):
    assert max(run_ranks(error_of_four, RANKS, family)) <= TOLERANCE


def spoil(world, family: str, kind: str) -> float:
    """The error once a mixer's state goes on into the next document, or each rank norms its own heads alone."""
    torch.set_num_threads(1)
    by_document = plan_file.by_document

    def by_document_unless_linear(module: nn.Module, shared: bool) -> None:
        if kind_of(module) is None:
            by_document(module, shared)

    patches = {"state": dict(by_document=by_document_unless_linear), "norm": dict(norm_late=lambda *arguments: None)}
    with mock.patch.multiple(plan_file, **patches[kind]):
        found, _ = in_step(world, lambda: shared(family, world.rank, TargetMesh.make(world, 2, 1)))
    return relative(found, reference(family, world.rank))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_next", "state"), ("minimax", "state"), ("nemotron_h", "state"), ("minimax", "norm"), ("granitemoehybrid", "norm")],
)
def test_with_a_state_that_leaks_or_norms_of_own_heads_the_result_is_another(family, kind):
    assert max(run_ranks(spoil, RANKS, family, kind)) > 1e-2


def sums_of_a_forward(world) -> tuple[int, int]:
    """How many all-reduces a forward issues, and how many mixers norm late."""
    torch.set_num_threads(1)
    _, target = shared("minimax", world.rank, TargetMesh.make(world, 4, 1))
    with CountCollectives() as count, mock.patch.object(type(target.head), "argmax_and_lse", return_value=(None, None)):
        run_own(target, world.rank)
    return sum("allreduce" in name for _, name, _ in count.issued.calls), len(target.plan.late_norms)


def test_a_norm_over_all_heads_costs_one_sum_a_mixer_however_many_documents_there_are():
    assert sum(map(len, LENGTHS)) > RANKS
    for found, expected in run_ranks(sums_of_a_forward, RANKS):
        assert found == expected > 0
