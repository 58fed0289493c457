"""The benchmark of the attention of draft blocks runs where it can."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Place, measured
from benchmarks.kernels import bench_anchored_attention

ON_CPU = Place(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def small_measurements_of_the_machine(monkeypatch):
    monkeypatch.setitem(harness.PRODUCT_SIZE, "cpu", 256)
    monkeypatch.setattr(harness, "COPIED_BYTES", 1 << 20)


def test_every_provider_of_the_attention_runs():
    shape = bench_anchored_attention.BlockShape(64, 2, 4, 8, (4, 2, 16), window=9)
    assert_runs(bench_anchored_attention.BENCHMARK, shape, ["reference", "tiles"])


def assert_runs(benchmark: harness.Benchmark, shape: Any, providers: list[str]) -> None:
    (figures,) = measured(replace(benchmark, shapes={"tiny": shape}), ["tiny"], providers, ON_CPU, 1)
    assert [row["provider"] for row in figures["rows"]] == providers
    assert all("error" not in row and row["over_floor"] > 0 for row in figures["rows"]), figures["rows"]
