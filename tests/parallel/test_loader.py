"""A rank's slices of a checkpoint are what it would have kept of the whole model, and cost no more than they take."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from engine.config import TargetSection
from engine.parallel.loader import Checkpoint, load_cut
from engine.parallel.mesh import Group, TargetMesh
from engine.parallel.plan import TargetPlan
from engine.parallel.rules import Cut
from engine.target.anatomy import decoder_of
from engine.target.frozen import FrozenTarget
from tests.distributed import run_ranks
from tests.parallel.families import tiny_model
from tests.parallel.family_matrix import AUX, TOLERANCE, reference, relative, run_own

# Plain, fused, per-expert, transposed and renamed layouts; tied heads; recurrences.
FAMILIES = ["llama", "phi3", "qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "gemma2", "qwen3_next", "jamba"]
MEBIBYTE = 1 << 20


def on_meta(folder: Path) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


def cuts_of(model: PreTrainedModel, tp: int, ep: int, rank: int) -> dict[str, Cut]:
    decoder = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    plan = TargetPlan.of(decoder, TargetMesh(Group(tp, rank % tp), Group(ep, rank % ep)))
    return {f"{prefix}.{name}": cut for name, cut in plan.cuts.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_and_buffers_are_those_of_the_whole_model_bit_for_bit(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path, max_shard_size="20KB")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    weights, buffers = whole.state_dict(), dict(whole.named_buffers())
    for tp, ep, rank in ((1, 1, 0), (2, 1, 1), (1, 2, 1), (2, 2, 0)):
        model = on_meta(tmp_path)
        cuts = cuts_of(model, tp, ep, rank)
        load_cut(model, cuts, Checkpoint(str(tmp_path)), torch.device("cpu"))
        loaded = model.state_dict()
        assert loaded.keys() == weights.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor, cuts[name].of(weights[name]) if name in cuts else weights[name]), name
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def load_and_run(world, folder: Path, family: str) -> float:
    torch.set_num_threads(1)
    mesh = TargetMesh.make(world, 2, 4)
    target = FrozenTarget.load(TargetSection(path=str(folder)), torch.device("cpu"), AUX, mesh=mesh)
    return relative(run_own(target, world.rank), reference(family, world.rank)[:2])


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_a_target_that_is_read_in_slices_gives_what_the_whole_one_gives(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    assert max(run_ranks(load_and_run, 4, tmp_path, family)) <= TOLERANCE


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


def test_a_folder_without_weights_and_one_that_lacks_a_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint(str(tmp_path))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"are missing: model-00002-of-00002\.safetensors"):
        Checkpoint(str(tmp_path))


def anonymous_bytes() -> int:
    """Host memory of this process that is its own: mapped files do not count."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def load_and_watch(world, folder: Path) -> tuple[int, int]:
    """Bytes that stay, and the most that there were beside them while loading."""
    torch.set_num_threads(1)
    mesh = TargetMesh.make(world, 2, 4)
    before, most, done = anonymous_bytes(), 0, threading.Event()

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
    total, largest = (
        sum(weight.nbytes for weight in model.parameters()),
        max(torch.empty(Checkpoint(str(tmp_path)).shape(name)).nbytes for name in Checkpoint(str(tmp_path))),
    )
    del model
    assert total > 400 * MEBIBYTE
    for resident, beside in run_ranks(load_and_watch, 4, tmp_path):
        assert resident < 0.45 * total
        assert beside < 2 * largest + 48 * MEBIBYTE, (resident, beside, largest)  # the rest is Python's: modules, threads
