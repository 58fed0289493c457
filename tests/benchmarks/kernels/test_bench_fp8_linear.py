"""The benchmark of fp8 products runs where it can; on a GPU the fused ones reach their bars."""

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Place, measured
from benchmarks.kernels.bench_fp8_linear import BENCHMARK


@pytest.mark.parametrize("shape", ["cpu-map-1-64", "cpu-experts-8-64"])
def test_every_provider_runs(shape, monkeypatch):
    monkeypatch.setitem(harness.PRODUCT_SIZE, "cpu", 256)
    place = Place(torch.device("cpu"), torch.float32)
    (figures,) = measured(BENCHMARK, [shape], ["dense", "dequantised"], place, 1)
    assert all("error" not in row and row["rows/s"] > 0 for row in figures["rows"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: elsewhere nothing is dequantised on the chip")
@pytest.mark.parametrize("shape", ["deepseek-o-1-16", "deepseek-up-16-256", "deepseek-down-16-256", "qwen3-up-128-1024"])
def test_on_a_gpu_few_rows_a_weight_are_faster_than_dense_ones(shape):
    place = Place(torch.device("cuda"), torch.bfloat16)
    (figures,) = measured(BENCHMARK, [shape], ["dense", "fused"], place, 10)
    dense, fused = figures["rows"]
    assert dense["median_ms"] >= 1.3 * fused["median_ms"], figures["rows"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: elsewhere nothing is multiplied in fp8")
@pytest.mark.parametrize("shape", ["deepseek-o-1-8192", "deepseek-up-16-8192", "deepseek-down-16-8192", "qwen3-up-128-65536"])
def test_on_a_gpu_many_rows_in_fp8_are_faster_than_dense_ones(shape):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that multiplies fp8: compute capability 8.9 or later")
    place = Place(torch.device("cuda"), torch.bfloat16)
    (figures,) = measured(BENCHMARK, [shape], ["dense", "fp8 rows"], place, 10)
    dense, fp8_rows = figures["rows"]
    assert dense["median_ms"] >= 1.3 * fp8_rows["median_ms"], figures["rows"]
