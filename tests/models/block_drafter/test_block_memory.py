"""Bytes that are computed for the activations of a block drafter are those that live in a training step."""

from dataclasses import replace
from typing import Any

import pytest

from engine.kernels import PLAIN
from engine.models.draft_method import ActivationBytes
from tests import block_drafts
from tests.block_drafts import (
    every_token,
    make_batch,
    make_config,
    make_method_of,
    make_micro,
    make_objective,
    make_tables,
    norms_of,
)
from tests.live_bytes import LiveBytes

SIZE = 128
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dflash": ("dflash", "none", {}),
    "dspark": ("dspark", "none", {}),
    "dspark, mlp again": ("dspark", "mlp", {"markov_head": "gated", "causal": True}),
    "dflash2": ("dflash2", "none", {}),
    "dflash2, mlp again": ("dflash2", "mlp", {"conv_taps": 3}),
    "dflash2, layers again": ("dflash2", "layer", {}),
}


@pytest.fixture
def wide(monkeypatch):
    """Drafts wide enough for their states to outweigh the plan of the rows, whose numbers are as many for any width."""
    monkeypatch.setattr(block_drafts, "HIDDEN", SIZE)
    monkeypatch.setattr(block_drafts, "VOCAB", 512)
    monkeypatch.setattr(block_drafts, "MASK_TOKEN", 511)


def computed_and_measured(name: str, recompute: str, block: dict[str, Any]) -> tuple[ActivationBytes, ActivationBytes]:
    """The memory of a micro-batch's activations, without the gradients of weights, which are planned elsewhere."""
    method = make_method_of(name, size=8, recompute=recompute, **block)
    config = replace(make_config(method), intermediate_size=2 * SIZE, head_dim=SIZE // 4)
    draft = method.new_draft(config, replace(PLAIN, recompute=recompute), make_tables(), every_token())
    for weight in draft.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    objective = make_objective(method)
    batch = make_batch((40, 60))
    micro = make_micro(method, batch)
    norms = norms_of(objective, [micro])
    live = LiveBytes()
    with live:
        loss = objective(draft, micro, norms).loss
        kept = live.now()
        loss.backward()
    measured = ActivationBytes(kept, live.peak - kept)
    return method.activation_bytes(config, method.count_work(batch, micro.allowed_ST), 4, fused=False), measured


@pytest.mark.parametrize("case", CASES)
def test_it_is_within_a_tenth_of_what_lives(case, wide):
    computed, measured = computed_and_measured(*CASES[case])
    assert computed.kept == pytest.approx(measured.kept, rel=0.1)
    assert computed.kept + computed.on_top == pytest.approx(measured.kept + measured.on_top, rel=0.1)
