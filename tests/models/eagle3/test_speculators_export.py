"""The folder in the format of vLLM's library `speculators`.

The comparison with the library needs version 0.9.0 of it, which is not among the test dependencies:

    pip install --no-deps --target FOLDER speculators==0.9.0 hs-connectors==0.9.0 loguru pydantic-settings python-dotenv
    PYTHONPATH=FOLDER python -m pytest tests/models/eagle3/test_speculators_export.py
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from engine.models.draft_method import TargetFacts
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import exported_aux_layers
from engine.models.eagle3.export import load_draft
from engine.models.eagle3.served_draft import ServedEagle3
from engine.models.eagle3.speculators_export import export_speculators
from engine.models.eagle3.warm_start import start_from_draft
from engine.models.vocab_map import VocabMap
from tests.tiny import DRAFT_VOCAB, HIDDEN, VOCAB, make_draft, make_micro, make_test

VOCAB_MAP = VocabMap.most_frequent(torch.randint(9, (VOCAB,), generator=torch.Generator().manual_seed(3)), DRAFT_VOCAB)
WHOLE_MAP = VocabMap.most_frequent(torch.ones(VOCAB, dtype=torch.long), VOCAB)
EMBED_VD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(4))
STEPS = 3
SHAPES = {
    "EAGLE-3": {},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "three layers": {"num_hidden_layers": 3},
    "whole vocabulary": {"draft_vocab_size": VOCAB},
    "scaled RoPE": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}
HAS_LIBRARY = importlib.util.find_spec("speculators") is not None


def draft_with(**changes: object) -> Eagle3Draft:
    """A draft whose norms are not ones, so that a norm in another place changes the logits."""
    torch.manual_seed(1)
    draft = Eagle3Draft(replace(make_draft().config, **changes))
    for parameter in draft.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.3, 2.0)
    return draft


def vocab_map_of(draft: Eagle3Draft) -> VocabMap:
    return WHOLE_MAP if draft.config.draft_vocab_size == VOCAB else VOCAB_MAP


def write(folder: Path, draft: Eagle3Draft, target: str = "org/model") -> Path:
    facts = TargetFacts(target, ("LlamaForCausalLM",), num_steps=4)
    export_speculators(folder, draft.state_dict().items(), draft.config, vocab_map_of(draft), EMBED_VD, facts)
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_the_config_says_what_the_library_and_vllm_read(tmp_path):
    exported = config_of(write(tmp_path / "draft", draft_with(**SHAPES["EAGLE-3.1"])))
    assert exported["speculators_model_type"] == "eagle3" and exported["draft_vocab_size"] == DRAFT_VOCAB
    assert exported["norm_before_residual"] is False, "vLLM's default is true"
    assert exported["fc_norm"] is True and exported["norm_output"] is True
    speculators = exported["speculators_config"]
    assert speculators["algorithm"] == "eagle3" and speculators["verifier"]["name_or_path"] == "org/model"
    assert speculators["proposal_methods"][0]["speculative_tokens"] == 4
    assert speculators["proposal_methods"][0]["proposal_type"] == speculators["default_proposal_method"]
    assert exported["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4], "inputs of layers, one more than the outputs read"
    assert exported_aux_layers(exported, tmp_path) == (1, 2, 3)
    layer = exported["transformer_layer_config"]
    assert layer["model_type"] == "llama" and layer["vocab_size"] == VOCAB and layer["head_dim"] == 8
    assert layer["tie_word_embeddings"] is False
    assert LlamaConfig(**layer).rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tensors_have_the_names_of_the_library(shape, tmp_path):
    draft = draft_with(**SHAPES[shape])
    tensors = load_file(write(tmp_path / "draft", draft) / "model.safetensors")
    own = draft.state_dict()
    num_layers = draft.config.num_hidden_layers
    assert torch.equal(tensors["embed_tokens.weight"], EMBED_VD) and torch.equal(
        tensors["lm_head.weight"], own["lm_head.weight"]
    )
    first = "midlayer" if num_layers == 1 else "layers.0"
    for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        assert torch.equal(tensors[f"layers.0.{norm}.weight"], own[f"{first}.{norm}.weight"])
    for index in range(1, num_layers):
        assert torch.equal(tensors[f"layers.{index}.input_layernorm.weight"], own[f"layers.{index}.hidden_norm.weight"])
        assert f"layers.{index}.hidden_norm.weight" not in tensors, "these are plain Llama layers"
    has_tables = {"d2t", "t2d"} <= tensors.keys()
    assert has_tables == (shape != "whole vocabulary")
    assert len(tensors) == len(own) + 1 + 2 * has_tables
    assert not any("midlayer" in name for name in tensors)


def test_training_can_start_from_the_folder(tmp_path):
    draft = draft_with()
    folder = write(tmp_path / "draft", draft)
    other = Eagle3Draft(draft.config)
    start_from_draft(other, folder, VOCAB_MAP)
    for name, weight in draft.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name


def test_commands_that_read_a_draft_name_the_folder_that_they_need(tmp_path):
    folder = write(tmp_path / "draft", draft_with())
    with pytest.raises(ValueError, match="format of speculators.*export_draft.py --format sglang"):
        load_draft(folder, EMBED_VD)


def test_what_the_format_cannot_express_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"draft.hidden_size=24 differs from the target's 32.*--format sglang"):
        write(tmp_path / "draft", draft_with(hidden_size=24))
    assert not (tmp_path / "draft").exists()


@pytest.mark.skipif(not HAS_LIBRARY, reason="speculators 0.9.0 is not installed; see the top of this file")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_library_computes_the_same_logits(shape, tmp_path):
    from speculators.models.eagle3 import Eagle3DraftModel

    target = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=8,
        vocab_size=VOCAB,
        architectures=["LlamaForCausalLM"],
    )
    draft = draft_with(**SHAPES[shape])
    folder = write(tmp_path / "draft", draft, str(tmp_path / "target"))
    (tmp_path / "target").mkdir()
    target_weights = {"model.embed_tokens.weight": EMBED_VD, "lm_head.weight": EMBED_VD, "model.norm.weight": EMBED_VD[0]}
    save_target(tmp_path / "target", target, target_weights)
    exported = config_of(folder)
    exported["transformer_layer_config"]["_attn_implementation"] = "eager"
    (folder / "config.json").write_text(json.dumps(exported))
    loaded = Eagle3DraftModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert loaded.config.eagle_aux_hidden_state_layer_ids == [2, 3, 4]

    micro = make_micro(make_test(steps=STEPS), seed=0)
    batch = micro.batch
    own_STU = ServedEagle3(draft, vocab_map_of(draft), EMBED_VD).logits(micro)
    found = []
    loaded.lm_head.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    document_T = torch.repeat_interleave(torch.arange(len(batch.host_lengths)), torch.tensor(batch.host_lengths))
    # The library shifts a batch by itself: row t reads the state of t and the token after it.
    next_T = torch.cat([batch.input_ids_T[1:], batch.input_ids_T[:1]])
    with torch.no_grad():
        loaded(micro.target.aux_TA[None], next_T[None], document_T[None], ttt_steps=STEPS)
    compared = 0
    for step in range(STEPS):
        # A row is compared where its token lies in its document.
        starts = torch.arange(batch.num_tokens)
        ends_T = torch.repeat_interleave(batch.cu_seqlens[1:].long(), torch.tensor(batch.host_lengths))
        inside_T = starts + 1 + step < ends_T
        # Both compute in fp32, and sum in another order.
        torch.testing.assert_close(found[step][inside_T], own_STU[step][inside_T], rtol=1e-4, atol=1e-4)
        compared += int(inside_T.sum())
    assert compared > STEPS * 30


def save_target(folder: Path, config: LlamaConfig, weights: dict[str, torch.Tensor]) -> None:
    """Write what the library reads of a target: its config, embedding, head and last norm."""
    config.save_pretrained(folder)
    save_file({name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
