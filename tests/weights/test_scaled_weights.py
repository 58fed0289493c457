"""Checkpoints in fp8 with a scale per tensor or row and in NVFP4 are read as what they mean, whoever wrote them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.config.sections import TargetSection
from engine.target.configuration import MODELOPT_CONFIG, load_target_config
from engine.target.frozen import FrozenTarget
from engine.weights.quantised_checkpoint import StaysQuantised
from engine.weights.quantised_weight import QuantisedWeight
from engine.weights.weight_files import SINGLE
from tests.parallel.families import tiny_model
from tests.parallel.family_matrix import AUX, TOLERANCE, relative, run_own
from tests.weights.test_quantised_checkpoint import CPU, FP4, assert_experts_are_fused, load

FP8_MAX = 448.0
MODELOPT_FP8 = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
MODELOPT_NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
FLOAT_GROUP = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
COMPRESSED_FP8 = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"0": FLOAT_GROUP}}
COMPRESSED_NVFP4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}


def fp8_tensor(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One scale per tensor, and a static one of its inputs, as ModelOpt writes them."""
    scale = weight.abs().max() / FP8_MAX
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stem = name.removesuffix(".weight")
    return {name: codes, f"{name}_scale": scale, f"{stem}.input_scale": torch.tensor(0.01)}


def fp8_rows(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scale per output row in bfloat16, as compressed-tensors writes them."""
    scale = (weight.abs().amax(1, keepdim=True) / FP8_MAX).to(torch.bfloat16)
    return {name: (weight / scale.float()).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def random_nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, in] of random values, and scales in fp8 [out, in / 16]."""
    generator = torch.Generator().manual_seed(weight.numel())
    codes = torch.randint(0, 16, weight.shape, generator=generator)
    scale = torch.rand(weight.shape[0], weight.shape[1] // 16, generator=generator) * 100 + 1
    return codes, scale.to(torch.float8_e4m3fn)


def packed(codes: torch.Tensor) -> torch.Tensor:
    return (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def meaning_of_nvfp4(codes: torch.Tensor, scale: torch.Tensor, over_all: torch.Tensor) -> torch.Tensor:
    values = FP4[codes % 8] * (1 - 2 * (codes // 8))
    return values * (scale.float() * over_all).repeat_interleave(16, 1)


def nvfp4_modelopt(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scale = random_nvfp4(weight)
    stem = name.removesuffix(".weight")
    beside = {f"{name}_scale": scale, f"{name}_scale_2": torch.tensor(2.0**-9), f"{stem}.input_scale": torch.tensor(0.01)}
    return {name: packed(codes), **beside}


def nvfp4_compressed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scale = random_nvfp4(weight)
    stem = name.removesuffix(".weight")
    inputs = {f"{stem}.input_global_scale": torch.tensor([3.0])}
    return {f"{name}_packed": packed(codes), f"{name}_scale": scale, f"{name}_global_scale": torch.tensor([2.0**9]), **inputs}


def fp8_meaning(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return tensors[name].float() * tensors[f"{name}_scale"].float()


def nvfp4_meaning(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Of random codes, which depend on the shape alone."""
    out, blocks = tensors[f"{name}_scale"].shape
    return meaning_of_nvfp4(*random_nvfp4(torch.empty(out, blocks * 16)), torch.tensor(2.0**-9))


LAYOUTS = {
    "modelopt fp8": (MODELOPT_FP8, fp8_tensor, fp8_meaning),
    "fp8 without blocks": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor, fp8_meaning),
    "compressed fp8": (COMPRESSED_FP8, fp8_rows, fp8_meaning),
    "modelopt nvfp4": (MODELOPT_NVFP4, nvfp4_modelopt, nvfp4_meaning),
    "compressed nvfp4": (COMPRESSED_NVFP4, nvfp4_compressed, nvfp4_meaning),
}


def publish(layout: str, folder: Path, family: str = "qwen3_moe", in_file: bool = False) -> dict[str, torch.Tensor]:
    """A tiny target in a layout; what its quantised tensors mean, by name. in_file: say it as ModelOpt's own file does."""
    facts, write, meaning = LAYOUTS[layout]
    config = tiny_model(family).config
    for width in ("intermediate_size", "moe_intermediate_size"):
        if getattr(config, width, None):
            setattr(config, width, 64)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    meant: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        made = write(name, tensors.pop(name))
        tensors |= made
        meant[name] = meaning(made, name)
    cache = {"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(1.0)}
    save_file({key: value.contiguous() for key, value in (tensors | cache).items()}, folder / SINGLE, {"format": "pt"})
    path = folder / "config.json"
    content = json.loads(path.read_text())
    if in_file:
        named = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": facts["quant_algo"]}}
        (folder / MODELOPT_CONFIG).write_text(json.dumps(named))
    else:
        content["quantization_config"] = facts
    path.write_text(json.dumps(content))
    return meant


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_what_codes_times_scales_mean(layout, tmp_path):
    meant = publish(layout, tmp_path)
    for tp, ep, rank in ((1, 1, 0), (2, 1, 1), (1, 2, 1)):
        weights, cuts = load(tmp_path, tp, ep, rank)
        plain = [name for name in meant if name in weights]
        assert any("self_attn" in name for name in plain)
        for name in plain:
            assert torch.equal(weights[name], cuts[name].of(meant[name]) if name in cuts else meant[name]), name
        assert_experts_are_fused(weights, cuts, meant)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_stays_quantised_means_the_same_and_takes_a_byte_or_less(layout, tmp_path):
    publish(layout, tmp_path)
    is_fp8 = "nvfp4" not in layout
    for place in ((1, 1, 0), (2, 1, 1)):
        (expected, _), (some, _), (kept, _) = (load(tmp_path, *place, keep=keep) for keep in ("none", "fp8", "all"))
        quantised = [name for name, weight in kept.items() if isinstance(weight, QuantisedWeight)]
        assert any("experts" in name for name in quantised) and any("self_attn" in name for name in quantised)
        assert any(isinstance(weight, QuantisedWeight) for weight in some.values()) is is_fp8
        for name, weight in expected.items():
            assert torch.equal(kept[name], weight) and torch.equal(some[name], weight), name
        for name in quantised:
            assert kept[name].codes.nbytes == kept[name].numel() // (1 if is_fp8 else 2)


def test_modelopts_own_file_is_read_where_the_config_says_nothing(tmp_path):
    meant = publish("modelopt fp8", tmp_path, family="llama", in_file=True)
    target = FrozenTarget.load(TargetSection(path=str(tmp_path), keep_quantised="none"), CPU, AUX)
    weights = target.model.state_dict()
    assert all(torch.equal(weights[name], meaning) for name, meaning in meant.items())
    (tmp_path / MODELOPT_CONFIG).write_text('{"quantization"')
    with pytest.raises(ValueError, match=MODELOPT_CONFIG):
        FrozenTarget.load(TargetSection(path=str(tmp_path)), CPU, AUX)


@pytest.mark.parametrize("layout", ["modelopt fp8", "compressed nvfp4"])
def test_a_target_runs_on_quantised_weights_as_on_what_they_mean(layout, tmp_path):
    publish(layout, tmp_path)
    sections = [TargetSection(path=str(tmp_path), keep_quantised=keep) for keep in ("none", "all")]
    dense, kept = (run_own(FrozenTarget.load(section, CPU, AUX), 0) for section in sections)
    assert relative(kept, dense) <= TOLERANCE


@pytest.mark.parametrize("algorithm", ["W4A8_AWQ", "NVFP4_AWQ", "MXFP8", "INT4_AWQ", None])
def test_other_algorithms_of_modelopt_are_refused_by_name_before_weights_are_read(algorithm, tmp_path):
    publish("modelopt fp8", tmp_path, family="llama")
    (tmp_path / SINGLE).unlink()
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"]["quant_algo"] = algorithm
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"quant_method 'modelopt'.*{algorithm or 'reads only'}.*bfloat16") as error:
        FrozenTarget.load(TargetSection(path=str(tmp_path)), CPU, AUX)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [torch.ones(3), torch.ones(64, 4), torch.ones(64, 1, dtype=torch.int32)])
def test_scales_of_another_shape_or_kind_are_refused_by_name(scale, tmp_path):
    publish("modelopt fp8", tmp_path, family="llama")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tmp_path / SINGLE) | {f"{name}_scale": scale}
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}: expected F8_E4M3 codes with a float scale"):
        FrozenTarget.load(TargetSection(path=str(tmp_path)), CPU, AUX)


def test_a_plan_counts_what_stays_in_memory(tmp_path):
    publish("modelopt nvfp4", tmp_path)
    config = load_target_config(TargetSection(path=str(tmp_path)))
    assert StaysQuantised.of(config, "fp8") is None
    held = StaysQuantised.of(config, "all")
    weights, _ = load(tmp_path, 1, 1, 0, keep="all")
    for name, weight in weights.items():
        if isinstance(weight, QuantisedWeight):
            assert weight.nbytes == held.value_bytes * weight.numel(), name
