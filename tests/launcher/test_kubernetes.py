"""The manifest fits the operator's schema and the project's own options; the script of its pods starts and stops ranks."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from engine.config.ds_config import load_ds_config
from launcher.command import read_config
from launcher.train import parse_arguments
from tests.distributed import ROOT
from tests.waiting import HANG_S, wait_until

FOLDER = ROOT / "launcher" / "kubernetes"
SCRIPT = FOLDER / "start_ranks.sh"
SCHEMA = Path(__file__).with_name("pytorchjob_schema.json")
# Of the metadata, which the schema of a CustomResourceDefinition leaves to Kubernetes.
METADATA = {"name", "namespace", "labels", "annotations"}


def closed(schema: Any) -> Any:
    """Return a schema that refuses fields it does not name, as the API server does with `kubectl apply`."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: closed(part) for key, part in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        parts["additionalProperties"] = False
    return parts


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = closed(json.loads(SCHEMA.read_text()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture
def manifest() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load((FOLDER / "train.yaml").read_text()))


def replica(manifest: dict[str, Any], name: str = "Master") -> dict[str, Any]:
    return manifest["spec"]["pytorchReplicaSpecs"][name]


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    (found,) = replica(manifest)["template"]["spec"]["containers"]
    return found


def test_the_manifest_fits_the_schema_of_the_operator(validator, manifest):
    assert [error.message for error in validator.iter_errors(manifest)] == []
    assert set(manifest["metadata"]) <= METADATA and set(replica(manifest)["template"]["metadata"]) <= METADATA
    assert manifest["spec"]["nprocPerNode"] == str(container(manifest)["resources"]["limits"]["nvidia.com/gpu"])
    for name in ("Master", "Worker"):
        assert replica(manifest, name)["restartPolicy"] == "OnFailure" and replica(manifest, name)["replicas"] == 1
    spec = replica(manifest)["template"]["spec"]
    assert {mount["name"] for mount in container(manifest)["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


def misspell_claim(manifest: dict[str, Any]) -> None:
    volume = replica(manifest)["template"]["spec"]["volumes"][0]
    volume["persistentVolumeClaim"] = {"claim": volume["persistentVolumeClaim"]["claimName"]}


def misspell_grace_period(manifest: dict[str, Any]) -> None:
    spec = replica(manifest)["template"]["spec"]
    spec["terminationGracePeriodSecond"] = spec.pop("terminationGracePeriodSeconds")


def misspell_backoff(manifest: dict[str, Any]) -> None:
    manifest["spec"]["runPolicy"]["backOffLimit"] = manifest["spec"]["runPolicy"].pop("backoffLimit")


def give_a_number_of_ranks(manifest: dict[str, Any]) -> None:
    manifest["spec"]["nprocPerNode"] = 8


def misspell_variable(manifest: dict[str, Any]) -> None:
    container(manifest)["env"][0]["values"] = "x"


@pytest.mark.parametrize(
    "change, word",
    [
        (misspell_claim, "claim"),
        (misspell_grace_period, "terminationGracePeriodSecond"),
        (misspell_backoff, "backOffLimit"),
        (give_a_number_of_ranks, "8 is not of type"),
        (misspell_variable, "values"),
    ],
)
def test_a_misspelt_field_is_found(validator, manifest, change, word):
    change(manifest)
    assert any(word in error.message for error in validator.iter_errors(manifest))


def test_the_command_of_the_manifest_is_one_that_training_takes(manifest, monkeypatch):
    assert container(manifest)["command"] == ["bash", str(SCRIPT.relative_to(ROOT))]
    python, script, *arguments = container(manifest)["args"]
    assert python == "python" and (ROOT / script).is_file()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    parsed = parse_arguments()
    config = read_config(parsed)
    load_ds_config(parsed.ds_config)
    assert config.checkpoint.resume == "auto" and config.target.path.startswith("meta-llama/")
    shared = [config.output_dir, *config.data.train, *config.data.held_out]
    assert all(path.startswith("/shared/") for path in shared)


# A rank that shows its environment, and ends with 75 half a second after SIGTERM, as one that saves first.
RANK = """
trap 'sleep 0.5; exit 75' TERM
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $*" >> "$SEEN"
if [[ $RANK == "${FAILS:-}" ]]; then exit 3; fi
if [[ ${ENDS:-no} == yes ]]; then exit 0; fi
while :; do sleep 0.05; done
"""


def start(seen: Path, node: int = 1, **environment: str) -> subprocess.Popen:
    pod = {"PET_NPROC_PER_NODE": "2", "PET_NNODES": "3", "PET_NODE_RANK": str(node), "SEEN": str(seen)}
    command = [shutil.which("bash"), str(SCRIPT), "bash", "-c", RANK, "rank", "some", "arguments"]
    return subprocess.Popen(command, env=os.environ | pod | environment)


def lines(seen: Path) -> list[str]:
    return sorted(seen.read_text().splitlines()) if seen.exists() else []


def test_a_pod_has_a_rank_for_each_gpu_and_ends_with_the_first_error(tmp_path):
    assert start(tmp_path / "well", ENDS="yes").wait(HANG_S) == 0
    assert lines(tmp_path / "well") == ["2 0 6 2 some arguments", "3 1 6 2 some arguments"]
    assert start(tmp_path / "badly", node=0, ENDS="yes", FAILS="1").wait(HANG_S) == 3
    incomplete = subprocess.run(["bash", str(SCRIPT), "true"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert incomplete.returncode != 0 and "spec.nprocPerNode" in incomplete.stderr


def test_all_ranks_of_a_pod_get_its_signal_and_may_take_their_time(tmp_path):
    pod = start(tmp_path / "seen")
    wait_until(lambda: len(lines(tmp_path / "seen")) >= 2)
    sent_s = time.monotonic()
    pod.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    pod.send_signal(signal.SIGTERM)  # a second one does not end it either
    assert pod.wait(HANG_S) == 75
    assert time.monotonic() - sent_s > 0.4
