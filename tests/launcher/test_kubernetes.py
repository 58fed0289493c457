"""The Kubernetes manifest has fields that the operator knows, and a command that this version understands."""

import copy
import json
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from engine.config.ds_config import load_ds_config
from engine.config.recipe import load_config
from launcher.train import parse_arguments
from tests.distributed import ROOT

MANIFEST = ROOT / "launcher" / "kubernetes" / "train.yaml"
SCHEMA = json.loads(Path(__file__).with_name("pytorchjob.schema.json").read_text())


@pytest.fixture
def job() -> dict:
    return copy.deepcopy(yaml.safe_load(MANIFEST.read_text()))


def container_of(job: dict, replica: str) -> dict:
    (container,) = job["spec"]["pytorchReplicaSpecs"][replica]["template"]["spec"]["containers"]
    return container


def test_the_manifest_fits_the_operator_s_schema(job):
    jsonschema.validate(job, SCHEMA)
    assert container_of(job, "Master") == container_of(job, "Worker") and container_of(job, "Master")["name"] == "pytorch"


def test_a_misspelt_field_and_a_wrong_type_are_found(job):
    container_of(job, "Worker")["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        jsonschema.validate(job, SCHEMA)
    del container_of(job, "Worker")["volumeMount"]
    job["spec"]["nprocPerNode"] = 8
    with pytest.raises(jsonschema.ValidationError, match="8 is not of type 'string'"):
        jsonschema.validate(job, SCHEMA)


def test_every_mounted_volume_exists_and_the_command_has_options_of_this_version(job, monkeypatch):
    container = container_of(job, "Worker")
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    launcher, script, *arguments = container["command"]
    assert launcher == "torchrun" and (ROOT / script).is_file()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    parsed = parse_arguments()
    load_ds_config(parsed.ds_config)
    config = load_config(parsed.recipe, parsed.overrides)
    assert config.checkpoint.resume == "auto"
    mounted = tuple(mount["mountPath"] for mount in container["volumeMounts"])
    for path in (*config.data.train, *config.data.held_out, config.data.cache_dir, config.output_dir):
        assert path.startswith(mounted), f"{path} would be lost with the container"
