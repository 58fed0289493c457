"""Quantisations that only Transformers knows are left to it on one rank, and any other is refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config.sections import TargetSection
from engine.parallel.mesh import Group, TargetMesh
from engine.target import loading
from engine.target.frozen import FrozenTarget
from engine.target.loading import refuse_misfits
from engine.weights import quantised_checkpoint
from engine.weights.quantised_checkpoint import check_quantisation
from engine.weights.weight_files import SINGLE
from engine.weights.weight_reader import MisfitError
from tests.parallel.families import tiny_model
from tests.parallel.family_matrix import AUX
from tests.published import change_config

CPU = torch.device("cpu")


def quantised_by(folder: Path, **facts: object) -> TargetSection:
    """A tiny target whose config says that it is quantised."""
    tiny_model("llama").save_pretrained(folder)
    change_config(folder, quantization_config=facts)
    return TargetSection(path=str(folder))


@pytest.mark.parametrize("method", ["mine", "modelopt_awq", None])
def test_a_method_that_nobody_knows_is_refused_by_name_on_one_rank(method, tmp_path):
    section = quantised_by(tmp_path, quant_method=method, bits=3)
    (tmp_path / SINGLE).unlink()
    found = repr(method) if method else "a method that it does not name"
    with pytest.raises(ValueError, match=f"is quantised by .*{found}.*name a checkpoint in one of these or in bfloat16"):
        FrozenTarget.load(section, CPU, AUX)


@pytest.fixture
def with_accelerate(monkeypatch):
    """As if the package accelerate were installed, which Transformers needs for its quantisers."""
    monkeypatch.setattr(quantised_checkpoint.importlib.util, "find_spec", lambda name: name)


def test_a_method_that_transformers_reads_needs_accelerate_from_the_start(tmp_path, monkeypatch):
    section = quantised_by(tmp_path, quant_method="gptq", bits=4)
    monkeypatch.setattr(quantised_checkpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'gptq'.*pip install accelerate"):
        check_quantisation(AutoConfig.from_pretrained(tmp_path), section.path, is_shared=False)


def test_a_method_that_transformers_knows_is_refused_where_ranks_share_the_target(tmp_path, with_accelerate):
    section = quantised_by(tmp_path, quant_method="gptq", bits=4)
    config = AutoConfig.from_pretrained(tmp_path)
    check_quantisation(config, section.path, is_shared=False)
    refuse_misfits(section)
    with pytest.raises(ValueError, match="'gptq'.*or set parallel.tp_size=1 and ep_size=1"):
        FrozenTarget.load(section, CPU, AUX, mesh=TargetMesh(Group(2, 0), Group()))


class Reader:
    """Stands for a quantiser of Transformers': what it reads here is not quantised, and `device_map` needs accelerate."""

    @staticmethod
    def from_pretrained(path: str, *, config, device_map, **options):
        assert device_map == CPU and config.quantization_config["quant_method"] == "gptq"
        plain = AutoConfig.from_pretrained(path)
        del plain.quantization_config
        return AutoModelForCausalLM.from_pretrained(path, config=plain, **options)


def test_what_transformers_reads_has_to_fit_too(tmp_path, monkeypatch, with_accelerate):
    section = quantised_by(tmp_path, quant_method="gptq", bits=4)
    monkeypatch.setattr(loading, "auto_class", lambda config: Reader)
    weights = load_file(tmp_path / SINGLE)
    assert FrozenTarget.load(section, CPU, AUX).model.training is False
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights | {"extra": torch.zeros(1)}, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(MisfitError) as error:
        FrozenTarget.load(section, CPU, AUX)
    for misfit in ("layers.1.mlp.up_proj.weight: missing", "extra: no such weight", "norm.weight: has shape [3]"):
        assert misfit in str(error.value)
