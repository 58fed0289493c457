"""A target's forward runs with every provider, and they do the same work; on a GPU packed documents reach their bar."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from benchmarks import bench_target, harness
from benchmarks.bench_target import BENCHMARK, BLOCK, SMALL_MOE, TargetShape, in_fp8, quantised
from benchmarks.harness import Place, measured
from engine.target.frozen import FrozenTarget

SIZES = SMALL_MOE | dict(vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, head_dim=8)
SHAPES = {family: TargetShape(AutoConfig.for_model(family, **SIZES), 50, 20) for family in ("llama", "qwen3_moe")}
ON_CPU = Place(torch.device("cpu"), torch.float32)
BYTES_OF_8B = 40 << 30


@pytest.mark.parametrize("shape", SHAPES)
def test_every_provider_runs(shape, monkeypatch):
    monkeypatch.setitem(harness.PRODUCT_SIZE, "cpu", 256)
    on_cpu = [name for name, provider in BENCHMARK.providers.items() if "cpu" in provider.devices]
    (figures,) = measured(replace(BENCHMARK, shapes=SHAPES), [shape], on_cpu, ON_CPU, 1)
    assert [row["provider"] for row in figures["rows"]] == on_cpu
    for row in figures["rows"]:
        assert "error" not in row and row["tokens/s"] > 0
        assert row["of_product"] == row["mfu"], "no datasheet knows this machine"


@pytest.mark.parametrize("shape", SHAPES)
def test_providers_do_the_same_work(shape):
    tensors = bench_target.prepare(SHAPES[shape], ON_CPU)
    logits = []
    output = bench_target._packed(tensors)()
    hook = tensors.model.get_output_embeddings().register_forward_hook(lambda module, args, result: logits.append(result[0]))
    bench_target._transformers(tensors)()
    hook.remove()
    torch.testing.assert_close(torch.cat(logits).logsumexp(-1), output.lse_N, rtol=1e-5, atol=0)


def test_weights_in_fp8_are_near_and_the_others_shared():
    model = bench_target.random_model(SHAPES["qwen3_moe"].config, ON_CPU)
    other = in_fp8(model)
    changed = {name for name, weight in other.named_parameters() if weight is not model.get_parameter(name)}
    factors = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "experts.gate_up_proj", "experts.down_proj")
    assert changed == {name for name, _ in model.named_parameters() if name.endswith(factors)}
    for name in changed:
        weight = model.get_parameter(name)
        kept = other.get_parameter(name)
        assert kept.nbytes < weight.nbytes / 2
        assert (kept.dequantised() - weight).abs().max() <= weight.abs().max() / 16, "e4m3 has 3 bits of fraction"
    assert {other.get_parameter(name).row_group for name in changed} == {None}
    rounding = in_fp8(model, fp8_activations=True)
    assert {rounding.get_parameter(name).row_group for name in changed} == {BLOCK}
    plain, rounded = (
        FrozenTarget(of, None)(SHAPES["qwen3_moe"].batch, SHAPES["qwen3_moe"].slots_N) for of in (other, rounding)
    )
    assert not torch.allclose(plain.last_hidden_ND, rounded.last_hidden_ND, rtol=1e-3)


@pytest.mark.parametrize("shape", [(BLOCK, BLOCK), (3 * BLOCK + 5, BLOCK - 1), (2, BLOCK + 1, 2 * BLOCK)])
def test_the_largest_value_of_a_block_is_kept(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[-2], 1).exp2()
    kept = quantised(weight).dequantised()
    block = weight[..., :BLOCK, :BLOCK].flatten(-2)
    place = block.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(kept[..., :BLOCK, :BLOCK].flatten(-2).gather(-1, place), block.gather(-1, place))


def figures_of_8b(*providers: str) -> list[dict]:
    if torch.cuda.mem_get_info()[0] < BYTES_OF_8B:
        pytest.skip("needs 40 GiB of free GPU memory")
    place = Place(torch.device("cuda"), torch.bfloat16)
    (figures,) = measured(BENCHMARK, ["llama3.1-8b-32k"], providers, place, 10)
    return figures["rows"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: a CPU would take minutes for each forward")
def test_on_a_gpu_packed_documents_take_half_of_the_rate_of_products():
    (row,) = figures_of_8b("packed")
    assert row["of_product"] >= 0.5, row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: elsewhere nothing is multiplied in fp8")
def test_on_a_gpu_a_target_in_fp8_is_faster_than_in_bf16():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that multiplies fp8: compute capability 8.9 or later")
    dense, fp8 = figures_of_8b("packed", "packed fp8 x fp8")
    assert dense["median_ms"] >= 1.3 * fp8["median_ms"], (dense, fp8)
