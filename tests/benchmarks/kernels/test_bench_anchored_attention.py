"""The benchmark of the attention of draft blocks runs where it can."""

from benchmarks.kernels.bench_anchored_attention import BENCHMARK, BlockShape
from tests.benchmarks.tiny_benchmarks import assert_runs


def test_every_provider_of_the_attention_runs(monkeypatch):
    assert_runs(BENCHMARK, BlockShape(64, 2, 4, 8, (4, 2, 16), window=9), ["reference", "tiles"], monkeypatch)
