"""Run the benchmark of a kernel on a tiny shape."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Benchmark, Place, measured


def assert_runs(benchmark: Benchmark, shape: Any, providers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless each provider is measured on a CPU, beside its floor. The machine is measured with small sizes."""
    monkeypatch.setitem(harness.PRODUCT_SIZE, "cpu", 256)
    monkeypatch.setattr(harness, "COPIED_BYTES", 1 << 20)
    place = Place(torch.device("cpu"), torch.float32)
    (figures,) = measured(replace(benchmark, shapes={"tiny": shape}), ["tiny"], providers, place, 1)
    assert [row["provider"] for row in figures["rows"]] == providers
    assert all("error" not in row and row["over_floor"] > 0 for row in figures["rows"]), figures["rows"]
