"""Targets that ranks share give what they give alone; see family_matrix.py for all of them."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from engine.batch import PackedBatch
from engine.parallel import blocks
from engine.parallel.mesh import Group, TargetMesh
from engine.parallel.plan import TargetPlan
from engine.target import attention, frozen
from engine.target.masks import DocumentMasks, document_masks
from engine.target.packed_row import PackedRow
from engine.target.structure import decoder_of
from tests.distributed import run_ranks
from tests.parallel.families import tiny_model
from tests.parallel.family_matrix import (
    CASES,
    LENGTHS,
    RANKS,
    TOLERANCE,
    in_step,
    reference,
    relative,
    run_all,
    run_own,
    shared,
)

# One of each kind: plain, fused, sinks and window, latent keys, dense experts, chunks, full-width norms, soft caps, linear
# attention, an indexer, a recurrence, experts without weights, blocks of keys, residual streams (with attention on own tokens),
# keys and values that an earlier layer left, a padded vocabulary.
SAMPLE = ["llama", "phi3", "gpt_oss", "deepseek_v3", "llama4_text", "olmoe", "gemma2", "qwen3_next", "deepseek_v32", "jamba"]
SAMPLE += ["qwen3_moe", "minimax", "granitemoe", "gpt_neox", "longcat_flash", "minimax_m3_vl_text", "hy_v4", "deepseek_v4"]
SAMPLE += ["gemma4_unified_text", "inkling_text"]
ON_OWN_TOKENS = {"deepseek_v4", "inkling_text"}
EXPERTS = ("moe", "deepseek", "gpt_oss", "llama4", "next", "jamba", "minimax", "longcat", "hy_v4", "inkling")


@pytest.fixture(scope="module")
def rows():
    return {row["family"]: row for row in run_ranks(run_all, RANKS, SAMPLE)[0]}


@pytest.mark.parametrize("family", SAMPLE)
def test_shared_targets_give_what_they_give_alone_a_document_at_a_time(rows, family):
    row = rows[family]
    assert row["reason"] is None, row.get("trace")
    assert row["tp"] is (family not in ON_OWN_TOKENS) and 0 < row["error"] <= TOLERANCE
    has_experts = any(part in family for part in EXPERTS)
    assert row["ep"] is has_experts and len(row["errors"]) == len(CASES) - (not has_experts)


def without_masks(**arguments) -> DocumentMasks:
    masks = document_masks(**arguments)
    return DocumentMasks(masks.lengths, masks.device)


def without_sinks(*arguments, s_aux, **options) -> tuple[torch.Tensor, None]:
    return attention.attend_documents(*arguments, **options)


def spoil(world, family: str, kind: str) -> float:
    """The error once documents see each other, a window is as wide as the document, or sinks are gone."""
    torch.set_num_threads(1)
    mesh = TargetMesh.make(world, 2, 1)
    expected = reference(family, world.rank)
    if kind == "mask":

        def together(decoder, row, packs):
            return attention.packed_attention(decoder, PackedRow((row.num_tokens,), row.device), packs)

        patch = mock.patch.object(frozen, "packed_attention", together)
        AttentionMaskInterface.register(attention.NAME, without_masks)
    elif kind == "window":
        patch = nullcontext()
        AttentionMaskInterface.register(attention.NAME, without_masks)
    else:
        patch = nullcontext()
        AttentionInterface.register(attention.NAME, without_sinks)
    with patch:
        found, _ = in_step(world, lambda: shared(family, world.rank, mesh))
    return relative(found, expected)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "mask"), ("gpt_oss", "mask"), ("gpt_oss", "window"), ("gemma3_text", "window"), ("gpt_oss", "sinks")],
)
def test_without_masks_windows_or_sinks_the_result_is_another(family, kind):
    assert max(run_ranks(spoil, RANKS, family, kind)) > 1e-2


def in_parts(world, family: str) -> tuple[float, int, int]:
    """The largest difference of a forward in three parts from one in a single part, and how many sums each of them starts."""
    torch.set_num_threads(1)
    outputs = []
    started = []
    lengths = ((5, 6, 2, 5), (6, 6, 6))[world.rank]
    ids_T = 3 + torch.arange(sum(lengths)) % 29
    batch = PackedBatch(ids_T, torch.ones_like(ids_T, dtype=torch.bool), torch.tensor([0, *lengths]).cumsum(0).int())
    for parts in (1, 3):
        target = frozen.FrozenTarget(tiny_model(family), (0, 1, 2), mesh=TargetMesh.make(world, 2, 1, parts=parts))
        with mock.patch.object(blocks, "start_summing", wraps=blocks.start_summing) as counted:
            output = target(batch, torch.arange(len(ids_T)))
        outputs.append([output.aux_TA, output.last_hidden_ND])
        started.append(counted.call_count)
    return relative(*outputs), *started


IN_PARTS = ["llama", "gpt_oss", "qwen3_moe", "qwen3_next", "minimax", "llama4_text", "gemma4_unified_text"]


@pytest.mark.parametrize("family", IN_PARTS)
def test_exchanging_in_parts_changes_nothing(family):
    for difference, whole, parts in run_ranks(in_parts, 2, family):
        assert difference <= TOLERANCE and parts == 3 * whole


def resting(world, family: str) -> float:
    """Ranks bring one, two or no batches; those that have none rest. The largest error of any batch."""
    torch.set_num_threads(1)
    mesh = TargetMesh.make(world, 2, 4)
    expected = reference(family, world.rank)
    found, target = shared(family, world.rank, mesh)
    errors = [relative(found, expected)]
    if world.rank % 2:
        errors.append(relative(run_own(target, world.rank), expected[:2]))
    target.join_other_forwards()
    return max(errors)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_ranks_without_a_batch_rest_while_others_run(family):
    assert max(run_ranks(resting, RANKS, family)) <= TOLERANCE


def plan(family: str, tp: int = 1, ep: int = 1, rank: int = 0) -> TargetPlan:
    model = tiny_model(family)
    return TargetPlan.of(decoder_of(model), TargetMesh(Group(tp, rank), Group(ep, rank)))


def test_the_parts_of_all_ranks_make_up_every_weight():
    for family in ("llama", "phi3", "gpt_oss", "qwen3_moe"):
        weights = dict(decoder_of(tiny_model(family)).named_parameters())
        plans = [plan(family, tp=2, rank=rank) for rank in range(2)]
        for name, cut in plans[0].cuts.items():
            if not cut.intervals:
                continue
            held = sum(stop - start for shares in plans for start, stop in shares.cuts[name].intervals)
            assert held == weights[name].shape[cut.dim], (family, name)


def test_heads_that_cannot_be_shared_stay_and_are_reported_with_sizes_that_would_do():
    found = plan("llama", tp=3)
    reasons = {why for name, why in found.replicated.items() if name.endswith("self_attn")}
    assert reasons == {"4 heads and 2 key/value heads cannot be shared by 3 ranks; use a parallel.tp_size of [1, 2, 4]"}


def test_key_heads_fewer_than_ranks_are_held_by_several():
    cuts = [plan("llama", tp=4, rank=rank).cuts["layers.0.self_attn.k_proj.weight"].intervals for rank in range(4)]
    assert cuts == [((0, 8),), ((0, 8),), ((8, 16),), ((8, 16),)]


def test_experts_that_cannot_be_shared_are_reported():
    assert "4 experts cannot be shared by 3 ranks; use one of [1, 2, 4]" in plan("qwen3_moe", ep=3).replicated.values()


def test_the_plan_of_weights_on_the_meta_device_is_that_of_real_ones():
    model = tiny_model("gpt_oss")
    real = TargetPlan.of(decoder_of(model), TargetMesh(Group(2, 1), Group()))
    assert TargetPlan.of(decoder_of(model.to("meta")), TargetMesh(Group(2, 1), Group())) == real


def moved(world, family: str) -> tuple[list[int], list[int], int]:
    """Elements of the tensors that a forward gathers and sums, on this rank, and tokens times width of the group."""
    torch.set_num_threads(1)
    mesh = TargetMesh.make(world, 2, 1)
    gathered = []
    summed = []
    target = frozen.FrozenTarget(tiny_model(family), (0, 1, 2), mesh=mesh)
    gather = blocks.start_gathering
    scatter = blocks.start_summing

    def counted_gather(x, dim, counts, group):
        gathered.append(x.numel() // x.shape[dim] * sum(counts))
        return gather(x, dim, counts, group)

    def counted_sum(partial, *arguments):
        summed.append(partial.numel())
        return scatter(partial, *arguments)

    with mock.patch.multiple(blocks, start_gathering=counted_gather, start_summing=counted_sum):
        run_own(target, world.rank)
    pair = LENGTHS[world.rank // 2 * 2], LENGTHS[world.rank // 2 * 2 + 1]
    return gathered, summed, sum(map(sum, pair)) * target.config.hidden_size


@pytest.mark.parametrize(("family", "layers"), [("llama", 4), ("gpt_oss", 4)])
def test_a_layer_moves_each_state_into_and_out_of_two_blocks_and_nothing_else(family, layers):
    for gathered, summed, states in run_ranks(moved, RANKS, family):
        choices = [count for count in gathered if count != states]  # of experts, with their weights
        assert gathered.count(states) == summed.count(states) == len(summed) == 2 * layers
        assert len(choices) == (2 * layers if family == "gpt_oss" else 0) and all(count <= states / 8 for count in choices)
