"""Formulas of cost against products that PyTorch counts, against loops, and against figures worked out by hand.

In float64 the draft's maps take `aten.mm`. Attention always computes in float32, in batched products or through oneDNN, so the
two are told apart.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.batch import MicroBatch, TargetOutput
from engine.config.sections import TttSection
from engine.kernels import AttentionRows, RowWeights, SlotTargets, blocked_attention
from engine.kernels.row_index import ROW_GRANULE
from engine.kernels.vocab_loss import vocab_loss
from engine.models.costs import Cost, StepPart, attention_part, frozen_head_part, head_part
from engine.models.eagle3 import flops
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import Eagle3Config
from engine.models.eagle3.row_plan import RowPlan, plan_rows
from engine.models.eagle3.unroll import unroll
from engine.models.training_rows import loss_rows, row_slots
from tests.pairwise import pairwise
from tests.slow_ttt import slow_allowed
from tests.tasks import ALIGNMENTS, DRAFT_VOCAB, HIDDEN, LENGTHS, MASKS, STEPS, VOCAB, Task, make_documents

LLAMA_8B = flops.DraftShape(4096, 14336, 32, 8, 128, 32000, 4096, 128256)
TTT_STEPS = 4
NARROW = 24
SHAPE = flops.DraftShape(HIDDEN, 48, 4, 2, 10, DRAFT_VOCAB, HIDDEN, VOCAB)  # E such that H * E is not D
ONEDNN = [torch.ops.mkldnn._linear_pointwise] if torch.backends.mkldnn.is_available() else []


def make_draft(size: int, num_layers: int) -> Eagle3Draft:
    exported = {
        "hidden_size": size,
        "intermediate_size": SHAPE.intermediate_size,
        "num_attention_heads": SHAPE.num_heads,
        "num_key_value_heads": SHAPE.num_groups,
        "head_dim": SHAPE.head_dim,
        "num_hidden_layers": num_layers,
        "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT_VOCAB,
        "target_hidden_size": HIDDEN,
        "max_position_embeddings": 128,
    }
    draft = Eagle3Draft(Eagle3Config.from_dict(exported)).double()
    if draft.embed_projection is not None:
        draft.embed_projection.requires_grad_(False)
    return draft


def make_plan(compaction: bool) -> tuple[MicroBatch, RowPlan, flops.StepCounts]:
    """A micro-batch, the rows that run of it, and how many of everything that is."""
    task = Task(TttSection(steps=TTT_STEPS))
    micro = task.micro(make_documents((40, 1, 90), "reply"))
    target = TargetOutput(micro.target.aux_TA.double(), *list(vars(micro.target).values())[1:])
    allowed_ST = slow_allowed(micro.batch, task.ttt)
    micro = MicroBatch(micro.batch, target, micro.embed_TD.double(), allowed_ST)
    carries_loss_ST = loss_rows(allowed_ST, target, task.vocab_map)
    plan = plan_rows(carries_loss_ST, row_slots(target.slots_N, allowed_ST), micro.batch.cu_seqlens, 1000, compaction)
    rows = [micro.batch.num_tokens]
    for index in plan.kept:
        rows.append(rows[-1] if index is None else index.numel())
    counts = flops.StepCounts(micro.batch.num_tokens, tuple(rows[1:]), (0,) * TTT_STEPS, 0, 0, 0, 0)
    return micro, plan, counts


def counter() -> FlopCounterMode:
    def onednn(x_shape, weight_shape, *_, **__) -> int:
        return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]

    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(ONEDNN, onednn))


def plain_products(counted: FlopCounterMode) -> int:
    return counted.get_flop_counts()["Global"].get(torch.ops.aten.mm, 0)


def parts_of(size: int, num_layers: int, counts: flops.StepCounts) -> dict[str, StepPart]:
    return flops.step_parts(flops.DraftShape(size, *list(vars(SHAPE).values())[1:8], num_layers), counts)


@pytest.mark.parametrize("size", [HIDDEN, NARROW])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("compaction", [True, False])
def test_linear_maps_take_the_products_that_pytorch_counts(compaction, num_layers, size):
    micro, plan, counts = make_plan(compaction)
    draft = make_draft(size, num_layers)
    parts = parts_of(size, num_layers, counts)
    with counter() as forward:
        outputs = unroll(draft, micro, TTT_STEPS, plan)
    with counter() as backward:
        torch.cat(outputs).sum().backward()
    maps = sum((parts[name] for name in ("fc", "qkv", "o", "mlp")), parts.get("embed_projection", StepPart(Cost())))
    # The draft multiplies the embedding beside the state, in every row anew and with an input gradient; formulas, once a token
    rows = counts.rows_S if num_layers == 1 else (counts.num_tokens, *counts.rows_S[1:])
    query = 2 * size * SHAPE.num_heads * SHAPE.head_dim
    key_value = 4 * size * SHAPE.num_groups * SHAPE.head_dim
    once = rows[0] * query + counts.num_tokens * key_value
    each_row = once + sum(rows[1:]) * (query + key_value)
    assert plain_products(forward) == maps.forward.flops + each_row - once
    assert plain_products(backward) == maps.backward.flops + 2 * each_row - once


def test_compaction_is_what_the_counts_say():
    counts = {compaction: make_plan(compaction)[2] for compaction in (True, False)}
    assert counts[False].rows_S == (counts[False].num_tokens,) * TTT_STEPS
    assert all(a < b for a, b in zip(counts[True].rows_S, counts[False].rows_S, strict=True))


@pytest.mark.parametrize("num_ancestors", [0, 3])
def test_attention_takes_the_products_that_pytorch_counts(monkeypatch, num_ancestors):
    monkeypatch.setattr(blocked_attention, "ROWS_PER_BLOCK", 1)  # then a block holds the keys of its row and no others
    heads = num_heads, num_groups, head_dim = 6, 2, 5
    cu_seqlens = torch.tensor([0, 7, 8, 20])
    position_Q = torch.tensor([0, 3, 6, 7, 11, 19])
    num_rows = position_Q.numel()
    num_keys = 20
    ancestors = tuple(torch.arange(num_rows) for _ in range(num_ancestors))
    query_QHE = torch.randn(num_rows, num_heads, head_dim, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, num_keys, num_groups, head_dim, dtype=torch.float64, requires_grad=True).unbind()
    extras = [[torch.randn(num_rows, num_groups, head_dim, dtype=torch.float64) for _ in ancestors] for _ in range(2)]
    rows = AttentionRows(position_Q, cu_seqlens, ancestors)
    with counter() as forward:
        output_QHE, _ = blocked_attention.ancestor_attention(query_QHE, key, value, *extras, rows)
    with counter() as backward:
        output_QHE.sum().backward()
    prefix_pairs = 1 + 4 + 7 + 1 + 4 + 12
    part = attention_part(num_rows, num_keys, prefix_pairs + num_ancestors * num_rows, heads)
    unseen = 4 * num_ancestors * num_rows * num_heads * head_dim  # a row has one key there: multiplied and summed, no product
    assert forward.get_total_flops() == part.forward.flops - unseen
    again = 2 * prefix_pairs * num_heads * head_dim  # the scores, formed anew
    assert backward.get_total_flops() == part.backward.flops - 2 * unseen + again


def test_heads_take_the_products_that_pytorch_counts():
    rows_S = (9, 7, 5)
    size = 12
    vocab_size = 40
    num_slots = 9
    num_rows = sum(rows_S)
    task = Task()
    zeros_N = torch.zeros(num_slots)
    hidden_RD, weight_UD = (torch.randn(rows, size, requires_grad=True) for rows in (num_rows, vocab_size))
    teacher_UD = torch.randn(vocab_size, size)
    slot_N = torch.arange(num_slots)
    targets = SlotTargets(torch.randn(num_slots, size), lambda hidden_nD: hidden_nD @ teacher_UD.T, zeros_N, zeros_N.long())
    carries_loss_ST = slot_N < torch.tensor(rows_S)[:, None]
    rows = plan_rows(carries_loss_ST, slot_N.expand(len(rows_S), -1), torch.tensor([0, num_slots]), 1000, True).loss
    with counter() as both:
        vocab_loss(hidden_RD, weight_UD, rows, targets, RowWeights(torch.ones(len(rows_S)))).total.backward()
    run = num_rows + -num_rows % ROW_GRANULE["cpu"]  # silent rows complete the granule
    head = head_part(run, size, vocab_size)
    teacher = frozen_head_part(num_slots, size, vocab_size)
    assert both.get_total_flops() == head.flops + teacher.flops
    with counter() as target_head:
        task.head.rows(torch.arange(VOCAB)).argmax_and_lse(torch.randn(num_slots, HIDDEN))
    assert target_head.get_total_flops() == frozen_head_part(num_slots, HIDDEN, VOCAB).flops


@pairwise(lengths=LENGTHS, mask=MASKS, alignment=ALIGNMENTS, steps=STEPS)
def test_needed_counts_are_those_of_a_loop(lengths, mask, alignment, steps):
    task = Task(TttSection(steps=steps, mask_alignment=alignment))
    micro = task.micro(make_documents(lengths, mask))
    batch = micro.batch
    slots_N = micro.target.slots_N
    carries_loss_ST = loss_rows(slow_allowed(batch, task.ttt), micro.target, task.vocab_map)
    counts = flops.StepCounts.needed(batch, carries_loss_ST, slots_N.numel())
    seen = [1 + t for length in lengths for t in range(length)]
    rows = [0] * steps
    pairs = [0] * steps
    asking = set()
    learned = set()
    for t in range(batch.num_tokens):
        for i in range(steps):
            if carries_loss_ST[i, t]:
                learned.add(t + 1 + i)
            if carries_loss_ST[i:, t].any():
                rows[i], pairs[i] = rows[i] + 1, pairs[i] + seen[t] + i
                asking.add(t + i)
    assert (counts.rows_S, counts.pairs_S, counts.prefix_pairs) == (tuple(rows), tuple(pairs), sum(seen))
    assert (counts.num_tokens, counts.num_loss_rows) == (sum(lengths), carries_loss_ST.sum())
    assert (counts.num_slots, counts.num_learned, counts.rows_S[0]) == (slots_N.numel(), len(learned), len(asking))


def test_a_row_of_an_8b_draft_takes_the_products_of_the_design():
    """MACs: fc 50M a token; a row q+k+v 50M, o 17M, MLP 176M, head 131M; a slot teacher 131M, target's head 0.53G."""
    one = flops.step_parts(LLAMA_8B, flops.StepCounts(1, (1,), (1000,), 1000, 1, 1, 1))
    macs = {name: round(part.forward.flops / 2 / 1e6) for name, part in one.items()}
    expected = {"fc": 50, "qkv": 50, "o": 17, "mlp": 176, "head": 131, "teacher": 131, "target_head": 525}
    assert macs == expected | {"attention": round(2 * 4096 * 1000 / 1e6)}
    twice = {name for name, part in one.items() if part.backward.flops == 2 * part.forward.flops}
    assert twice == {"attention", "o", "mlp", "head"}
    assert one["fc"].backward.flops == one["fc"].forward.flops
    assert one["qkv"].backward.flops * 2 == one["qkv"].forward.flops * 3  # the state's half twice, the embedding's once
    assert {name for name, part in one.items() if not part.backward.flops} == {"teacher", "target_head"}


def test_a_prompt_token_takes_fc_and_a_key_and_value():
    with_prompt, without = (
        flops.step_parts(LLAMA_8B, flops.StepCounts(num_tokens, (1,), (1,), 1, 1, 1, 1)) for num_tokens in (2, 1)
    )
    difference = sum(with_prompt[name].forward.flops - without[name].forward.flops for name in without)
    assert round(difference / 2 / 1e6) == 67


def test_every_tensor_is_counted_once_a_pass():
    counts = flops.StepCounts(10, (6, 4), (30, 20), 55, 7, 5, 3)
    parts = flops.step_parts(flops.DraftShape(8, 16, 4, 2, 3, 20, 8, 50), counts)
    written = 10 * 12 + 14 * 12  # queries of 6 + 4 rows, keys and values of 10 + 4
    weights = 8 * 2 * (12 + 12)
    states = (10 + 14) * 8
    embeddings = (6 + 10) * 8
    assert parts["qkv"].forward.elements == states + embeddings + weights + written
    assert parts["qkv"].backward.elements == written + 2 * states + embeddings + weights + weights // 2
    assert parts["fc"].forward.elements == 10 * 24 + 24 * 8 + 10 * 8
    assert parts["mlp"].forward.elements == 2 * 10 * 8 + 3 * 8 * 16
    assert parts["attention"].forward.elements == 2 * 10 * 12 + 14 * 12
    assert parts["attention"].backward.elements == 4 * 10 * 12 + 2 * 14 * 12
    assert parts["head"].forward.elements == parts["head"].backward.elements == (7 + 20) * 8
    assert (parts["teacher"].forward.elements, parts["target_head"].forward.elements) == ((3 + 20) * 8, (5 + 50) * 8)
