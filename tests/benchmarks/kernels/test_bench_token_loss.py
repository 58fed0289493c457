"""The benchmark of the loss of draft blocks runs where it can."""

from benchmarks.kernels.bench_token_loss import BENCHMARK, TokenShape
from tests.benchmarks.tiny_benchmarks import assert_runs


def test_every_provider_of_the_loss_runs(monkeypatch):
    assert_runs(BENCHMARK, TokenShape(24, 16, 32, 500, "soft", 4), ["reference", "chunks", "products"], monkeypatch)
