"""Folders that a server would run differently from the engine are found before they are served."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.sections import DraftSection, TargetSection
from engine.models.draft_folder import CONFIG, WEIGHTS
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import AUX_IDS, derive_draft_config
from engine.models.eagle3.export import export_draft
from engine.models.vocab_map import VocabMap
from engine.serving.draft_kinds import DFLASH, EAGLE3
from engine.serving.served_folder import serving_problems
from engine.target.configuration import load_target_config

EMBEDDED = Path(__file__).resolve().parents[2] / "launcher" / "embedded" / "target"
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "serving" / "draft"


@pytest.fixture(scope="module")
def target_config():
    return load_target_config(TargetSection(path=str(EMBEDDED)))


@pytest.fixture
def folder(tmp_path, target_config) -> Path:
    """An exported draft of two layers that reads other layers than the default ones."""
    config = derive_draft_config(target_config, DraftSection(num_layers=2, vocab_size=64), (0, 2, 5))
    vocab_map = VocabMap.most_frequent(torch.arange(config.vocab_size), 64)
    export_draft(tmp_path / "draft", Eagle3Draft(config).state_dict().items(), config, vocab_map, None)
    return tmp_path / "draft"


def change(folder: Path, **values) -> None:
    """Change keys of a config.json; None deletes one."""
    config = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_what_is_exported_here_is_served_as_it_is_measured(folder, target_config):
    assert serving_problems(folder, EAGLE3, target_config) == {}


def test_each_server_needs_its_own_list_of_layers(folder, target_config):
    layers = json.loads((folder / CONFIG).read_text())[AUX_IDS]
    change(folder, **{AUX_IDS: None})
    assert list(serving_problems(folder, EAGLE3, target_config)) == ["vLLM"]
    change(folder, **{AUX_IDS: layers}, eagle_config=None)
    problems = serving_problems(folder, EAGLE3, target_config)
    assert list(problems) == ["SGLang"] and "[0, 2, 5]" in problems["SGLang"]
    change(folder, **{AUX_IDS: None})
    assert serving_problems(folder, EAGLE3, target_config) == {}, "without any list, all take the default layers"


def test_sglang_needs_no_list_for_its_default_layers(folder, target_config):
    change(folder, **{AUX_IDS: [2, 4, 5]}, eagle_config=None)
    assert serving_problems(folder, EAGLE3, target_config) == {}


def test_vllm_needs_the_copies_of_norms_in_deeper_layers(folder, target_config):
    tensors = load_file(folder / WEIGHTS)
    del tensors["layers.1.input_layernorm.weight"]
    save_file(tensors, folder / WEIGHTS)
    problems = serving_problems(folder, EAGLE3, target_config)
    assert list(problems) == ["vLLM"] and "layers.1.input_layernorm.weight" in problems["vLLM"]


def test_vllm_refuses_a_table_of_the_whole_vocabulary(folder, target_config):
    change(folder, draft_vocab_size=target_config.vocab_size)
    assert "d2t" in serving_problems(folder, EAGLE3, target_config)["vLLM"]


@pytest.mark.parametrize("kind", [EAGLE3, DFLASH])
def test_no_server_drafts_rightly_with_fewer_positions_than_the_target_has(kind, folder, target_config):
    change(folder, max_position_embeddings=10)
    problems = serving_problems(folder, kind, target_config)
    assert set(problems) == {"SGLang", "vLLM"} and "max_position_embeddings=10" in problems["vLLM"]


def test_a_server_that_is_limited_to_the_positions_of_a_draft_serves_it(folder, target_config):
    change(folder, max_position_embeddings=100)
    assert "--max-model-len" in serving_problems(folder, EAGLE3, target_config)["vLLM"]
    assert serving_problems(folder, EAGLE3, target_config, context_length=100) == {}


def test_the_format_of_speculators_and_other_files_of_weights_are_not_taken_for_mistakes(folder, target_config):
    exported = json.loads((folder / CONFIG).read_text())
    nested = {"architectures": ["Eagle3Speculator"], "draft_vocab_size": 64, "transformer_layer_config": exported}
    (folder / CONFIG).write_text(json.dumps(nested))
    assert serving_problems(folder, EAGLE3, target_config) == {}
    nested["transformer_layer_config"] = exported | {"max_position_embeddings": 10}
    (folder / CONFIG).write_text(json.dumps(nested))
    assert "max_position_embeddings=10" in serving_problems(folder, EAGLE3, target_config)["vLLM"]
    (folder / CONFIG).write_text(json.dumps(exported))
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert serving_problems(folder, EAGLE3, target_config) == {}


def test_an_export_of_an_earlier_version_is_for_sglang_only(tmp_path, target_config):
    shutil.copytree(GOLDEN, tmp_path / "draft")
    problems = serving_problems(tmp_path / "draft", EAGLE3, target_config)
    assert list(problems) == ["vLLM"] and "[2, 4, 5]" in problems["vLLM"]
