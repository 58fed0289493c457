"""The benchmark of the target's head runs where it can."""

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Place, measured
from benchmarks.kernels.bench_head_stats import BENCHMARK


@pytest.mark.parametrize("shape", ["cpu-capped-256"])
def test_every_provider_runs(shape, monkeypatch):
    monkeypatch.setitem(harness.PRODUCT_SIZE, "cpu", 256)
    place = Place(torch.device("cpu"), torch.float32)
    providers = ["reference", "head", "product"]
    (figures,) = measured(BENCHMARK, [shape], providers, place, 1)
    assert all("error" not in row and row["slots/s"] > 0 for row in figures["rows"])
