"""Quantised checkpoints in the layouts that they are published in, whole and by the parts of a rank."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config.sections import TargetSection
from engine.evaluation.decoding import plain_decode
from engine.kernels import reference
from engine.parallel.mesh import ALONE, TargetMesh
from engine.parallel.rules import ShardSpec
from engine.target.frozen import FrozenTarget
from engine.weights import quantised_weight
from engine.weights.quantised_checkpoint import open_checkpoint
from engine.weights.quantised_weight import QuantisedWeight
from engine.weights.weight_loader import load_cut
from tests.distributed import run_ranks
from tests.parallel.families import tiny_model
from tests.parallel.family_matrix import AUX, TOLERANCE, relative, run_own
from tests.published import change_config
from tests.weights.test_weight_loader import cuts_of

CPU = torch.device("cpu")
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # and their negatives, by the highest bit


def to_fp8(folder: Path, block: tuple[int, int]) -> None:
    """A checkpoint's projections to fp8 with a scale a block, in the layout of DeepSeek-V3."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in list(weights.items()):
        if name.endswith("_proj.weight") and weight.ndim == 2:
            rows, columns = (torch.arange(size) // step for size, step in zip(weight.shape, block, strict=True))
            scale = torch.zeros(rows[-1] + 1, columns[-1] + 1)
            flat = (rows[:, None] * scale.shape[1] + columns).flatten()
            scale.view(-1).scatter_reduce_(0, flat, weight.abs().flatten(), "amax")
            scale /= torch.finfo(torch.float8_e4m3fn).max
            weights[name] = (weight / scale[rows][:, columns]).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))


def to_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's experts to random MXFP4 in the layout of GPT-OSS; what they mean, written out."""
    weights = load_file(folder / "model.safetensors")
    meant = {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, out = weights.pop(name).shape
        codes = torch.randint(0, 16, (experts, out, inputs), generator=generator)
        scales = torch.randint(124, 130, (experts, out, -(-inputs // 32)), generator=generator)
        pairs = codes.view(experts, out, inputs // 32, 16, 2)
        weights[f"{name}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
        weights[f"{name}_scales"] = scales.to(torch.uint8)
        values = FP4[codes % 8] * (1 - 2 * (codes // 8)) * torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
        meant[name] = values.transpose(1, 2).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def to_int4(folder: Path, group: int) -> dict[str, torch.Tensor]:
    """A checkpoint's experts to random packed int4 in the layout of compressed-tensors; what they mean, written out."""
    weights = load_file(folder / "model.safetensors")
    meant = {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if ".experts." in name and name.endswith("_proj.weight")]:
        rows, columns = weights.pop(name).shape
        values = torch.randint(-8, 8, (rows, columns), generator=generator)
        scale = torch.rand(rows, columns // group, generator=generator) + 0.1
        shifted = torch.nn.functional.pad(values + 8, (0, -columns % 8)).view(rows, -1, 8)
        packed = (shifted * 16 ** torch.arange(8)).sum(-1)
        weights[f"{name}_packed"] = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        weights[f"{name}_scale"], weights[f"{name}_shape"] = scale, torch.tensor([rows, columns])
        meant[name] = values * scale.repeat_interleave(group, 1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": group}}}
    facts = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    change_config(folder, quantization_config=facts)
    return meant


def assert_experts_are_fused(
    weights: dict[str, torch.Tensor], cuts: dict[str, ShardSpec], meant: dict[str, torch.Tensor]
) -> None:
    """The gate and up projections of all experts lie in one weight, of which a rank holds its part."""
    fused = [name for name in weights if name.endswith("experts.gate_up_proj")]
    assert fused
    for name in fused:
        stem = name.removesuffix("gate_up_proj")
        count = sum(key.startswith(stem) and key.endswith("gate_proj.weight") for key in meant)
        halves = [torch.stack([meant[f"{stem}{e}.{half}_proj.weight"] for e in range(count)]) for half in ("gate", "up")]
        whole = torch.cat(halves, dim=1)
        assert torch.equal(weights[name], cuts[name].of(whole) if name in cuts else whole), name


def test_int4_experts_are_read_as_what_they_mean(tmp_path):
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    meant = to_int4(tmp_path, group=8)
    for tp, ep, rank in ((1, 1, 0), (2, 1, 1), (1, 2, 1)):
        weights, cuts = load(tmp_path, tp, ep, rank)
        assert_experts_are_fused(weights, cuts, meant)


def load(folder: Path, tp: int, ep: int, rank: int, keep: str = "none") -> tuple[dict[str, torch.Tensor], dict[str, ShardSpec]]:
    config = AutoConfig.from_pretrained(folder)
    checkpoint = open_checkpoint(config, str(folder), None, keep)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cuts = cuts_of(model, tp, ep, rank)
    load_cut(model, cuts, checkpoint, torch.device("cpu"))
    return model.state_dict(), cuts


def test_mxfp4_experts_are_read_as_what_they_mean(tmp_path):
    config = tiny_model("gpt_oss").config
    config.intermediate_size = 64
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    meant = to_mxfp4(tmp_path)
    assert len(meant) == 2 * config.num_hidden_layers
    for tp, ep, rank in ((1, 1, 0), (2, 1, 1), (1, 2, 1)):
        weights, cuts = load(tmp_path, tp, ep, rank)
        for name, tensor in meant.items():
            assert torch.equal(weights[name], cuts[name].of(tensor) if name in cuts else tensor), name


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "lfm2_moe"])
def test_fp8_weights_are_read_as_value_times_scale(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    to_fp8(tmp_path, (12, 20))  # blocks that neither weights nor ranks' parts are multiples of
    models = [load(tmp_path, *sizes) for sizes in ((1, 1, 0), (2, 1, 1), (2, 2, 1))]
    weights = models[0][0]
    changed = [name for name in plain if name in weights and not torch.equal(weights[name], plain[name])]
    assert any("self_attn" in name for name in changed)
    for name in changed:
        assert (weights[name] - plain[name]).abs().max() <= plain[name].abs().max() / 16, "e4m3 has 3 bits of fraction"
    for loaded, cuts in models[1:]:
        for name, tensor in loaded.items():
            assert torch.equal(tensor, cuts[name].of(weights[name]) if name in cuts else weights[name]), name


def test_other_quantisations_are_refused_by_name(tmp_path):
    config = AutoConfig.for_model("llama")
    config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(ValueError, match="is quantised by quant_method 'compressed-tensors', and .*fp8 with a scale per block"):
        open_checkpoint(config, "here", None)


def publish(layout: str, folder: Path) -> None:
    """A tiny target in a layout, of sizes that cuts fall within blocks of."""
    if layout == "mxfp4":
        config = tiny_model("gpt_oss").config
        config.intermediate_size = 64
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        to_mxfp4(folder)
    elif layout == "int4":
        tiny_model("deepseek_v3").save_pretrained(folder)
        to_int4(folder, group=8)
    else:
        tiny_model(layout).save_pretrained(folder)
        to_fp8(folder, (12, 20))


LAYOUTS = ["deepseek_v3", "qwen3_moe", "mxfp4", "int4"]  # the first two in fp8


def quantised_names(weights: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, weight in weights.items() if isinstance(weight, QuantisedWeight)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_stays_quantised_means_what_is_dequantised_at_loading(layout, tmp_path):
    publish(layout, tmp_path)
    is_fp8 = layout in LAYOUTS[:2]
    for place in ((1, 1, 0), (2, 1, 0), (2, 1, 1), (1, 2, 1), (2, 2, 1)):
        (expected, _), (some, _), (kept, _) = (load(tmp_path, *place, keep=keep) for keep in ("none", "fp8", "all"))
        assert not quantised_names(expected) and quantised_names(some) == (quantised_names(kept) if is_fp8 else set())
        assert any("experts" in name for name in quantised_names(kept))
        assert is_fp8 == any("self_attn" in name for name in quantised_names(kept))
        for name, weight in expected.items():
            assert torch.equal(kept[name], weight) and torch.equal(some[name], weight), name


def test_a_target_in_fp8_takes_half_of_what_it_takes_in_bf16(tmp_path):
    config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=4, num_experts=8, vocab_size=64, hidden_size=256)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    to_fp8(tmp_path, (128, 128))
    sections = [TargetSection(path=str(tmp_path), dtype="bfloat16", keep_quantised=keep) for keep in ("none", "fp8")]
    dense, kept = (dict(FrozenTarget.load(section, CPU, AUX).model.named_parameters()) for section in sections)
    factors = quantised_names(kept)
    others = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
    assert factors == {name for name, weight in dense.items() if weight.ndim > 1 and not name.endswith(others)}
    # an fp32 scale for 128 x 128 values of a byte
    assert sum(kept[name].nbytes for name in factors) <= (0.5 + 2**-12) * sum(dense[name].nbytes for name in factors)
    assert all(kept[name].dtype == torch.bfloat16 and torch.equal(kept[name], dense[name]) for name in factors)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_where_triton_runs_every_weight_in_fp8_is_multiplied_on_the_chip(family, tmp_path, monkeypatch):
    fused = pytest.importorskip("engine.kernels.fp8_linear", reason="Triton is not installed")
    weights = []
    publish(family, tmp_path)
    target = FrozenTarget.load(TargetSection(path=str(tmp_path)), CPU, AUX)
    expected = run_own(target, 0)

    def seen(rows_MK, codes_XNK, *others):
        weights.append(codes_XNK.data_ptr())
        return fused.fp8_linear(rows_MK, codes_XNK, *others)

    monkeypatch.setattr(quantised_weight, "choose_fp8_linear", lambda device: seen)
    assert relative(run_own(target, 0), expected) <= TOLERANCE
    kept = [weight for weight in target.model.parameters() if isinstance(weight, QuantisedWeight)]
    assert sorted(weights) == sorted(weight.codes.data_ptr() for weight in kept)


def run_kept_and_dequantised(world, folder: Path, sizes: tuple[int, int]) -> tuple[float, float, int]:
    """The difference between the two, and between shared and not; how many weights stayed quantised."""
    torch.set_num_threads(1)
    mesh = TargetMesh.make(world, *sizes)
    kept, dense = (TargetSection(path=str(folder), keep_quantised=keep) for keep in ("all", "none"))
    target = FrozenTarget.load(kept, CPU, AUX, mesh=mesh)
    found = run_own(target, world.rank)
    count = len(quantised_names(dict(target.model.named_parameters())))
    expected = run_own(FrozenTarget.load(dense, CPU, AUX, mesh=mesh), world.rank)
    alone = run_own(FrozenTarget.load(kept, CPU, AUX), world.rank)
    return relative(found, expected), relative(found, alone), count


SPLIT_SUM_TOLERANCE = 5e-5  # fp32 sums that ranks add in another order; a wrong shard differs by about 1


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["tp", "ep"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_that_share_quantised_weights_compute_what_they_mean(layout, sizes, tmp_path):
    publish(layout, tmp_path)
    for from_dense, from_alone, count in run_ranks(run_kept_and_dequantised, 2, tmp_path, sizes):
        assert from_dense <= TOLERANCE
        assert from_alone <= SPLIT_SUM_TOLERANCE
        assert count > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_runs_and_decodes_with_a_quantised_target(layout, tmp_path):
    publish(layout, tmp_path)
    targets = [FrozenTarget.load(TargetSection(path=str(tmp_path), keep_quantised=keep), CPU, AUX) for keep in ("none", "all")]
    dense, kept = (run_own(target, 0) for target in targets)
    assert relative(kept, dense) <= TOLERANCE
    replies = [plain_decode(target, [5, 9, 40, 7], 12, set()).token_ids for target in targets]
    assert replies[0] == replies[1] and len(replies[0]) == 12


WHOLE_GROUPS = (8, 8)  # blocks that cuts by two fall between


@torch.no_grad()
def test_quantised_activations_are_what_every_map_in_fp8_reads(tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path)
    to_fp8(tmp_path, (12, 20))
    section = TargetSection(path=str(tmp_path), fp8_activations=True)
    found, plain = (run_own(FrozenTarget.load(of, CPU, AUX), 0) for of in (section, replace(section, fp8_activations=False)))
    dense = FrozenTarget.load(TargetSection(path=str(tmp_path), keep_quantised="none"), CPU, AUX)
    for module in dense.decoder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (reference.rounded_rows(args[0][0], 20)[None],))
    assert relative(found, run_own(dense, 0)) <= TOLERANCE and relative(found, plain) >= 1e-2


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_where_triton_runs_every_weight_in_fp8_is_multiplied_by_quantised_rows(family, tmp_path, monkeypatch):
    fused = pytest.importorskip("engine.kernels.fp8_activations", reason="Triton is not installed")
    groups = []
    tiny_model(family).save_pretrained(tmp_path)
    to_fp8(tmp_path, (32, 32))
    target = FrozenTarget.load(TargetSection(path=str(tmp_path), fp8_activations=True), CPU, AUX)
    expected = run_own(target, 0)

    def seen(*operands, group):
        groups.append(group)
        return fused.fp8_activations(*operands, group=group)

    monkeypatch.setattr(quantised_weight, "choose_fp8_linear", None)
    monkeypatch.setattr(quantised_weight, "choose_fp8_activations", lambda device: seen)
    # a value that lies between two codes may round to the other one where products add in another order
    assert relative(run_own(target, 0), expected) <= 1e-2
    assert groups == [32] * len(quantised_names(dict(target.model.named_parameters())))


def run_with_fp8_activations(world, folder: Path, sizes: tuple[int, int]) -> tuple[float, float]:
    """The difference between shared and not, and what quantised activations change."""
    torch.set_num_threads(1)
    section = TargetSection(path=str(folder), fp8_activations=True)
    mesh = TargetMesh.make(world, *sizes)
    found, alone = (run_own(FrozenTarget.load(section, CPU, AUX, mesh=by), world.rank) for by in (mesh, ALONE))
    plain = run_own(FrozenTarget.load(replace(section, fp8_activations=False), CPU, AUX), world.rank)
    return relative(found, alone), relative(found, plain)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["tp", "ep"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_ranks_that_share_a_target_quantise_activations_as_one_does(family, sizes, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    to_fp8(tmp_path, WHOLE_GROUPS)
    for from_alone, from_plain in run_ranks(run_with_fp8_activations, 2, tmp_path, sizes):
        # as above, of sums over ranks
        assert from_alone <= 1e-2 and from_plain >= 5e-2


@pytest.mark.parametrize("layout, found", [("mxfp4", "in MXFP4"), ("int4", "in packed int4"), (None, "not in fp8")])
def test_quantised_activations_are_refused_where_no_weight_is_in_fp8(layout, found, tmp_path):
    publish(layout, tmp_path) if layout else tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # before any weight is read
    section = TargetSection(path=str(tmp_path), fp8_activations=True)
    with pytest.raises(ValueError, match=f"fp8_activations=true: .*{found}.*set it to false, or name an fp8 checkpoint"):
        FrozenTarget.load(section, CPU)


@pytest.mark.parametrize("facts, found", [({"activation_scheme": "static"}, "static"), ({"scale_fmt": "ue8m0"}, "ue8m0")])
def test_activations_that_servers_quantise_in_another_way_are_refused(facts, found, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    to_fp8(tmp_path, (8, 8))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= facts
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=f"fp8_activations=true: servers of .* quantise activations by .*{found}.*set it to false"
    ):
        FrozenTarget.load(TargetSection(path=str(tmp_path), fp8_activations=True), CPU)


def test_scales_that_are_exponents_in_a_byte_are_read_under_either_name(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    to_fp8(tmp_path, (8, 8))
    weights = load_file(tmp_path / "model.safetensors")
    loaded = []
    scales = [name for name in weights if name.endswith("_scale_inv")]
    exponents = {name: torch.log2(weights[name]).round().clamp(-127, 127) for name in scales}
    published = {
        "numbers": {name: torch.exp2(exponent) for name, exponent in exponents.items()},
        "bytes": {name: (exponent + 127).to(torch.uint8) for name, exponent in exponents.items()},
        "beside": {name.replace(".weight_scale_inv", ".scale"): (x + 127).to(torch.uint8) for name, x in exponents.items()},
    }
    for form in published.values():
        kept = {name: weight for name, weight in weights.items() if name not in scales}
        save_file(kept | form, tmp_path / "model.safetensors", {"format": "pt"})
        loaded.append(FrozenTarget.load(TargetSection(path=str(tmp_path), keep_quantised="none"), CPU, AUX).model.state_dict())
    assert scales
    for others in loaded[1:]:
        assert all(torch.equal(weight, others[name]) for name, weight in loaded[0].items())


def test_a_weight_beside_a_scale_that_is_not_in_fp8_is_refused_by_name(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    to_fp8(tmp_path, (8, 8))
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if weights[name].dtype == torch.float8_e4m3fn)
    weights[name] = weights[name].view(torch.int8)  # as experts in fp4 are
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} has a scale and is stored as I8.*name a bfloat16 checkpoint"):
        FrozenTarget.load(TargetSection(path=str(tmp_path)), CPU, AUX)
