"""FLOPs that are computed for a block drafter are those of the matrix products of a training step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels import PLAIN, FrozenHead
from engine.models.block_drafter.block_costs import block_step_parts
from engine.models.block_drafter.block_rows import plan_blocks
from tests.block_drafts import VOCAB, make_batch, make_config, make_draft, make_method_of, make_micro, make_objective, norms_of

# Parts whose products are batched, or products with the table of the target's head.
OTHERS = ("attention", "candidates", "head", "teacher", "target_head", "markov_head")
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dflash": ("dflash", {}, {}),
    "dflash, few tokens seen": ("dflash", {}, {"windows": (3, 2)}),
    "dspark": ("dspark", {"confidence": 0.0}, {"causal": True}),
    "dflash2": ("dflash2", {}, {}),
    "dflash2, three taps": ("dflash2", {}, {"conv_taps": 3, "causal": True}),
    "dflash2 without the selector": ("dflash2", {"selector": 0.0}, {"conv_taps": 1}),
}


class ProductFlops(TorchDispatchMode):
    """While active, adds up the FLOPs of products of two matrices, except those with a side of `VOCAB` tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            sides = (*args[0].shape, args[1].shape[1])
            if VOCAB not in sides:
                self.total += 2 * torch.Size(sides).numel()
        return result


def elementwise_attention(query_QHE, key_TGE, value_TGE, own_key_PGE, own_value_PGE, rows):
    """Something that depends on all inputs, without a product of matrices."""
    others = (key_TGE, value_TGE, own_key_PGE, own_value_PGE)
    return query_QHE + sum(x.sum((0, 1)) for x in others)


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_the_products(case):
    name, objective_options, block = CASES[case]
    method = make_method_of(name, objective=objective_options, **block)
    draft = make_draft(method, replace(PLAIN, anchored_attention=elementwise_attention)).double()
    objective = make_objective(method)
    objective = replace(
        objective, frozen_head=FrozenHead(objective.frozen_head.weight_VD.double(), objective.frozen_head.transform)
    )
    micro = make_micro(method, make_batch((17, 23, 9)), dtype=torch.float64)
    counted = ProductFlops()
    with counted:
        objective(draft, micro, norms_of(objective, [micro])).loss.backward()
    parts = method.step_parts(draft.config, method.count_work(micro.batch, micro.allowed_ST))
    assert sum(part.flops for part_name, part in parts.items() if part_name not in OTHERS) == counted.total


def test_attention_of_the_last_layer_is_counted_for_the_rows_that_run_there():
    batch = make_batch((17, 23, 9))
    method = make_method_of("dflash2")
    counts = method.count_work(batch, method.allowed_rows(batch))
    plan = plan_blocks(batch, method.allowed_rows(batch), method.shape)
    rows = plan.layers[-1]
    seen_P = rows.context_end_Q - rows.context_begin_Q + rows.own_end_Q - rows.own_begin_Q
    assert counts.last_pairs < counts.leading_pairs == seen_P[plan.leading_row_Q].sum() < counts.pairs_of_layers[-1]
    config = make_config(method)
    pairs = counts.pairs_of_layers[0] + counts.leading_pairs
    attention = block_step_parts(config, counts, False, False, method.mixed_rows(config))["attention"]
    assert attention.flops == 12 * pairs * config.num_attention_heads * config.head_dim
