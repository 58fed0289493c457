"""The benchmark of a block drafter's step computes one loss in all its variants, and runs where it can."""

from dataclasses import replace

import pytest
import torch

from benchmarks.bench_block_step import BENCHMARK, METHODS, VARIANTS, make_step, prepare
from benchmarks.harness import Place
from tests.benchmarks.tiny_benchmarks import assert_runs

ON_CPU = Place(torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_all_variants_compute_the_same_loss_and_gradients(method):
    tensors = prepare(BENCHMARK.shapes[f"{method}-cpu-tiny-128-0.3"], ON_CPU)
    results = []
    for variant in VARIANTS.values():
        draft, forward = make_step(variant, tensors)
        loss = forward()
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in draft.parameters())])
    assert results[0][0] > 0
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-12)


def test_variants_are_measured_beside_the_floor(monkeypatch):
    shape = replace(BENCHMARK.shapes["dflash-cpu-tiny-128-1.0"], num_tokens=64, anchors=4)
    assert_runs(BENCHMARK, shape, list(VARIANTS), monkeypatch)
