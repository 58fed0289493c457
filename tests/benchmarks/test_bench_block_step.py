"""The variants of a block drafter's step compute one loss with different amounts of work."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_block_step import BENCHMARK, METHODS, VARIANTS, make_step, parts, prepare
from benchmarks.harness import Place
from tests.benchmarks.tiny_benchmarks import assert_runs

ON_CPU = Place(torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_all_variants_compute_the_same_loss_and_gradients(method):
    tensors = prepare(BENCHMARK.shapes[f"{method}-cpu-tiny-128-0.3"], ON_CPU)
    results = {}
    flops = {}
    for name, variant in VARIANTS.items():
        draft, forward = make_step(variant, tensors)
        with FlopCounterMode(display=False) as counter:
            loss = forward()
            loss.backward()
        results[name] = [loss.detach(), *(weight.grad for weight in draft.parameters())]
        flops[name] = counter.get_total_flops()
    assert results["as in a run"][0] > 0
    for result in results.values():
        torch.testing.assert_close(result, results["as in a run"], rtol=1e-9, atol=1e-12)
    least, *others = sorted(flops, key=flops.get)
    assert least == "as in a run" and flops[others[0]] > flops[least]
    assert flops["recompute layer"] > flops["recompute mlp"]


@pytest.mark.parametrize(("method", "block_size"), [("dflash", 16), ("dspark", 7), ("dflash2", 16)])
def test_the_drafts_of_qwen3_8b_are_those_of_the_recipes(method, block_size):
    shape = BENCHMARK.shapes[f"{method}-qwen3-8b-4096-1.0"]
    assert shape.draft.num_hidden_layers == 5 and shape.draft.block_size == block_size and shape.draft.hidden_size == 4096
    head = parts(shape)["head"].flops
    assert head <= 4 * 512 * block_size * 4096 * 151936
    assert head > 0.8 * 4 * 512 * (block_size - 1) * 4096 * 151936


def test_variants_are_measured_next_to_the_floor(monkeypatch):
    shape = replace(BENCHMARK.shapes["dflash-cpu-tiny-128-1.0"], num_tokens=64, anchors=4)
    assert_runs(BENCHMARK, shape, list(VARIANTS), monkeypatch)
