"""A rank's slices of a checkpoint are what it would have kept of the whole model, and cost no more than they take."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Llama4Config,
    Mistral3Config,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from engine.batch import PackedBatch
from engine.config.sections import TargetSection
from engine.parallel.mesh import Group, TargetMesh
from engine.parallel.plan import TargetPlan
from engine.parallel.rules import ShardSpec
from engine.target.frozen import FrozenTarget
from engine.target.structure import decoder_of, layers_of, name_of, vocabulary_cuts
from engine.weights.weight_files import SINGLE
from engine.weights.weight_loader import load_cut
from engine.weights.weight_reader import Checkpoint, MisfitError
from tests.distributed import run_ranks
from tests.parallel.families import tiny_model
from tests.parallel.family_matrix import AUX, TOLERANCE, reference, relative, run_own
from tests.published import change_config, change_weights

# Plain, fused, per-expert, transposed and renamed layouts; tied heads; recurrences; linear attention of every kind; names that
# a rule for other layouts fits by chance; experts without weights.
FAMILIES = ["llama", "phi3", "qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "gemma2", "qwen3_next", "jamba"]
FAMILIES += ["qwen3_5_text", "minimax", "kimi_linear", "bailing_hybrid", "olmo_hybrid", "nemotron_h", "lfm2_moe"]
FAMILIES += ["deepseek_v4", "longcat_flash"]
MEBIBYTE = 1 << 20
CPU = torch.device("cpu")


def on_meta(folder: Path) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


def cuts_of(model: PreTrainedModel, tp: int, ep: int, rank: int) -> dict[str, ShardSpec]:
    decoder = decoder_of(model)
    plan = TargetPlan.of(decoder, TargetMesh(Group(tp, rank % tp), Group(ep, rank % ep)))
    prefix = name_of(decoder, model)
    return {f"{prefix}.{name}": cut for name, cut in plan.cuts.items()} | vocabulary_cuts(model, Group(tp, rank % tp))


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_and_buffers_are_those_of_the_whole_model_bit_for_bit(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path, max_shard_size="20KB")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    weights = whole.state_dict()
    buffers = dict(whole.named_buffers())
    for tp, ep, rank in ((1, 1, 0), (2, 1, 1), (1, 2, 1), (2, 2, 0)):
        model = on_meta(tmp_path)
        cuts = cuts_of(model, tp, ep, rank)
        load_cut(model, cuts, Checkpoint(str(tmp_path)), torch.device("cpu"))
        loaded = model.state_dict()
        assert loaded.keys() == weights.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor, cuts[name].of(weights[name]) if name in cuts else weights[name]), name
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, cuts[name].of(buffers[name]) if name in cuts else buffers[name]), name


def load_and_run(world, folder: Path, family: str) -> float:
    torch.set_num_threads(1)
    mesh = TargetMesh.make(world, 2, 4)
    target = FrozenTarget.load(TargetSection(path=str(folder)), torch.device("cpu"), AUX, mesh=mesh)
    return relative(run_own(target, world.rank), reference(family, world.rank)[:2])


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "qwen3_next", "minimax"])
def test_a_target_that_is_read_in_slices_gives_what_the_whole_one_gives(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    assert max(run_ranks(load_and_run, 4, tmp_path, family)) <= TOLERANCE


SMALL_TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2)
TEXT = SMALL_TEXT | dict(vocab_size=96, head_dim=8)
VISION = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
PROJECTED = dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
EXPERTS = dict(intermediate_size_mlp=48, num_local_experts=4, no_rope_layers=[1, 1, 1, 0, 1, 1, 1])
MULTIMODAL = {
    "llama4": lambda: Llama4Config(text_config=TEXT | EXPERTS, vision_config=VISION | PROJECTED),
    "gemma3": lambda: Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4),
    "mistral3": lambda: Mistral3Config(
        text_config=TEXT | dict(model_type="mistral"), vision_config=VISION | dict(model_type="pixtral", head_dim=16)
    ),
}


def run_multimodal(world, folder: Path) -> tuple[float, int]:
    """The largest difference of a forward from that of one rank, and modules of attention that are shared."""
    torch.set_num_threads(1)
    section, (start, stop) = TargetSection(path=str(folder)), ((0, 4), (4, 10))[world.rank]
    ids_T = torch.arange(10)[start:stop]
    batch = PackedBatch(ids_T, torch.ones_like(ids_T, dtype=torch.bool), torch.tensor([0, stop - start]).int())
    slots_N = torch.arange(stop - start)
    shared = FrozenTarget.load(section, CPU, AUX, mesh=TargetMesh.make(world, 2, 1))
    outputs = [target(batch, slots_N).last_hidden_ND for target in (shared, FrozenTarget.load(section, CPU, AUX))]
    return relative(outputs[:1], outputs[1:]), len(shared.plan.heads)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_text_of_a_multimodal_checkpoint_is_shared_without_its_towers(family, tmp_path):
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(MULTIMODAL[family]()).save_pretrained(tmp_path)
    assert any("vision" in name for name in load_file(tmp_path / "model.safetensors"))
    for difference, num_shared in run_ranks(run_multimodal, 2, tmp_path):
        assert difference <= TOLERANCE and num_shared == TEXT["num_hidden_layers"]
    weights = load_file(tmp_path / "model.safetensors") | {"vision.nothing": torch.zeros(2)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match="vision.nothing: no such weight"):
        run_ranks(run_multimodal, 2, tmp_path)


def test_all_that_does_not_fit_is_listed_before_anything_is_read(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(7, 3)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    weights["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = on_meta(tmp_path)
    with pytest.raises(ValueError) as error:
        load_cut(model, {}, Checkpoint(str(tmp_path)), torch.device("cpu"))
    message = str(error.value)
    assert "model.layers.1.self_attn.q_proj.weight: missing" in message
    assert "model.layers.0.mlp.gate_proj.weight: has shape [7, 3], the config says [48, 32]" in message
    assert "model.layers.0.mlp.extra.weight: no such weight" in message
    assert all(parameter.is_meta for parameter in model.parameters())


def broken(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> TargetSection:
    """A tiny target whose tensors were changed."""
    tiny_model("llama").save_pretrained(folder)
    change_weights(folder, change)
    return TargetSection(path=str(folder))


def test_a_missing_tensor_is_refused_by_one_rank(tmp_path):
    section = broken(tmp_path, lambda weights: {k: v for k, v in weights.items() if "layers.2.mlp.up" not in k})
    with pytest.raises(MisfitError, match=r"does not fit.*\n  model\.layers\.2\.mlp\.up_proj\.weight: missing"):
        FrozenTarget.load(section, CPU, AUX)


def test_tensors_under_another_prefix_are_refused_by_one_rank(tmp_path):
    section = broken(tmp_path, lambda weights: {f"thinker.{name}": weight for name, weight in weights.items()})
    with pytest.raises(MisfitError) as error:
        FrozenTarget.load(section, CPU, AUX)
    for misfit in ("model.embed_tokens.weight: missing", "thinker.model.norm.weight: no such weight", " more ..."):
        assert misfit in str(error.value)


def test_a_head_of_its_own_that_is_absent_is_refused_by_one_rank(tmp_path):
    section = broken(tmp_path, lambda weights: {k: v for k, v in weights.items() if k != "lm_head.weight"})
    with pytest.raises(MisfitError, match="lm_head.weight: missing"):
        FrozenTarget.load(section, CPU, AUX)


def test_a_table_of_another_size_is_refused_by_one_rank(tmp_path):
    section = broken(tmp_path, lambda weights: weights | {"model.embed_tokens.weight": torch.zeros(5, 32)})
    with pytest.raises(MisfitError, match=r"model\.embed_tokens\.weight: has shape \[5, 32\], the config says"):
        FrozenTarget.load(section, CPU, AUX)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_codes_without_a_scale_are_never_taken_for_weights(dtype, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    section = broken(tmp_path, lambda weights: weights | {name: weights[name].to(dtype)})
    with pytest.raises(MisfitError, match=f"{name}: is stored as .*8.*, without a scale in a layout that is known"):
        FrozenTarget.load(section, CPU, AUX)


def test_what_no_model_reads_and_layers_that_predict_several_tokens_are_passed_over(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "mtp.fc.weight": torch.zeros(2)}
    section = broken(tmp_path, lambda weights: weights | extra)
    plain = FrozenTarget.load(section, CPU, AUX).model.state_dict()
    assert torch.equal(plain["model.norm.weight"], load_file(tmp_path / SINGLE)["model.norm.weight"])
    behind = f"model.layers.{len(layers_of(decoder_of(on_meta(tmp_path))))}.mlp.up_proj.weight"
    save_file(load_file(tmp_path / SINGLE) | {behind: torch.zeros(2)}, tmp_path / SINGLE)
    with pytest.raises(MisfitError, match=f"{behind}: no such weight"):
        FrozenTarget.load(section, CPU, AUX)
    change_config(tmp_path, num_nextn_predict_layers=1)
    FrozenTarget.load(section, CPU, AUX)


@pytest.mark.parametrize("present", [("lm_head",), ("model.embed_tokens",), ("lm_head", "model.embed_tokens")])
def test_a_tied_head_is_found_under_either_name_and_stays_apart_where_it_differs(present, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / SINGLE)
    absent = {f"{name}.weight" for name in ("lm_head", "model.embed_tokens") if name not in present}
    save_file({name: weight for name, weight in weights.items() if name not in absent}, tmp_path / SINGLE)
    change_config(tmp_path, tie_word_embeddings=True)
    target = FrozenTarget.load(TargetSection(path=str(tmp_path)), CPU, AUX)
    for name in present:
        assert torch.equal(target.model.state_dict()[f"{name}.weight"], weights[f"{name}.weight"])
    assert target.is_tied == (len(present) == 1)


def test_a_pickled_checkpoint_is_the_same_target(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    section = TargetSection(path=str(tmp_path))
    expected = FrozenTarget.load(section, CPU, AUX).model.state_dict()
    torch.save(load_file(tmp_path / SINGLE), tmp_path / "pytorch_model.bin")
    (tmp_path / SINGLE).unlink()
    found = FrozenTarget.load(section, CPU, AUX).model.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


def test_weights_that_a_family_keeps_in_float32_stay_so(tmp_path):
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    found = FrozenTarget.load(TargetSection(path=str(tmp_path), dtype="bfloat16"), CPU, AUX).model.state_dict()
    assert torch.float32 in {weight.dtype for weight in expected.values()}
    assert {name: weight.dtype for name, weight in found.items()} == {name: weight.dtype for name, weight in expected.items()}


def test_end_tokens_of_the_generation_config_are_known(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    target = FrozenTarget.load(TargetSection(path=str(tmp_path)), CPU, AUX)
    assert target.model.generation_config.eos_token_id == [3, 5]


def anonymous_bytes() -> int:
    """Host memory of this process that is its own: mapped files do not count."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def load_and_watch(world, folder: Path) -> tuple[int, int]:
    """Bytes that stay, and the most that there were beside them while loading."""
    torch.set_num_threads(1)
    mesh = TargetMesh.make(world, 2, 4)
    before = anonymous_bytes()
    most = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    target = FrozenTarget.load(TargetSection(path=str(folder)), torch.device("cpu"), AUX, mesh=mesh)
    done.set()
    watcher.join()
    resident = sum(weight.nbytes for weight in target.model.parameters())
    return resident, most - before - resident


def test_loading_needs_two_tensors_beside_what_stays(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    total = sum(weight.nbytes for weight in model.parameters())
    largest = max(torch.empty(Checkpoint(str(tmp_path)).shape(name)).nbytes for name in Checkpoint(str(tmp_path)))
    del model
    assert total > 400 * MEBIBYTE
    for resident, beside in run_ranks(load_and_watch, 4, tmp_path):
        assert resident < 0.45 * total
        # The rest is Python's: modules, threads, huge pages. A second copy of the rank's weights would be twice as much.
        assert beside < 2 * largest + 96 * MEBIBYTE, (resident, beside, largest)
