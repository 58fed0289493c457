"""The benchmark of the loss of draft blocks runs where it can."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Place, measured
from benchmarks.kernels import bench_token_loss

ON_CPU = Place(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def small_measurements_of_the_machine(monkeypatch):
    monkeypatch.setitem(harness.PRODUCT_SIZE, "cpu", 256)
    monkeypatch.setattr(harness, "COPIED_BYTES", 1 << 20)


def test_every_provider_of_the_loss_runs():
    shape = bench_token_loss.TokenShape(24, 16, 32, 500, "soft", 4)
    assert_runs(bench_token_loss.BENCHMARK, shape, ["reference", "chunks", "products"])


def assert_runs(benchmark: harness.Benchmark, shape: Any, providers: list[str]) -> None:
    (figures,) = measured(replace(benchmark, shapes={"tiny": shape}), ["tiny"], providers, ON_CPU, 1)
    assert [row["provider"] for row in figures["rows"]] == providers
    assert all("error" not in row and row["over_floor"] > 0 for row in figures["rows"]), figures["rows"]
