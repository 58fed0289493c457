"""A job on two nodes, for which two processes with a folder each stand: what they decide together, and what travels."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config.ds_config import load_ds_config
from engine.config.recipe import load_config
from engine.config.sections import Config
from engine.parallel.mesh import World
from engine.parallel.nodes import copy_from_main, is_shared
from engine.trainer import Trainer
from tests.distributed import run_ranks

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launcher" / "recipes" / "embedded.yaml"
DS_CONFIG = ROOT / "ds_configs" / "zero2.json"


def refusal(action: Any, *arguments: Any) -> str:
    with pytest.raises(ValueError) as refused:
        action(*arguments)
    return str(refused.value)


def decide(world: World) -> dict[str, Any]:
    def fail() -> None:
        raise ValueError(f"rank {world.rank} cannot read it")

    return {"value": world.decide(lambda: {"from": world.rank}), "refusal": refusal(world.decide, fail)}


def two_nodes(world: World, folder: Path, options: list[str]) -> dict[str, Any]:
    """Everything that a rank of two nodes sees; each has a working folder of its own."""
    world = World(rank=world.rank, size=world.size, local_rank=0, local_size=1)
    results: dict[str, Any] = {"decided": decide(world)}
    results["one folder"] = is_shared(folder / "common" / "run", world)
    own = folder / f"node{world.rank}"
    own.mkdir()
    os.chdir(own)
    output = Path("run").absolute()
    results["own folders"] = is_shared(output, world)
    results["left behind"] = [path.name for path in output.iterdir()] if output.exists() else []

    (own / "files").mkdir()
    if world.is_main:
        (own / "files" / "full").write_bytes(bytes(range(256)) * 5)
        (own / "files" / "empty").write_bytes(b"")
    apart = replace(world, shares_output=False)
    copy_from_main(own / "files", ("full", "empty"), apart)

    def trainer(*more: str) -> Trainer:
        config: Config = load_config(RECIPE, [*options, f"output_dir={output}", *more])
        return Trainer(config, load_ds_config(DS_CONFIG) | {"bf16": {"enabled": False}}, apart)

    results["resume"] = refusal(trainer("checkpoint.resume=true").run)
    report = trainer().run()
    results["acceptance length"] = report.after.acceptance_length
    return results


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, tiny_target, tiny_corpus) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that holds those of both nodes, and what each of them saw."""
    folder = tmp_path_factory.mktemp("nodes")
    options = [
        f"target.path={tiny_target}",
        "target.aux_layers=[0,1,3]",
        f"data.train=[{tiny_corpus.train}]",
        f"data.held_out=[{tiny_corpus.held_out}]",
        "data.max_tokens=40",
        "draft.vocab_size=48",
        "ttt.steps=2",
        "max_steps=2",
        "evaluation.num_prompts=2",
        "evaluation.max_new_tokens=4",
    ]
    return folder, run_ranks(two_nodes, 2, folder, options)


def test_every_rank_decides_as_rank_0_does(nodes):
    for seen in nodes[1]:
        assert seen["decided"] == {"value": {"from": 0}, "refusal": "rank 0 cannot read it"}


def test_a_folder_that_nodes_share_is_told_from_one_that_they_do_not_and_stays_empty(nodes):
    folder, (first, second) = nodes
    assert first["one folder"] is second["one folder"] is True
    assert first["own folders"] is second["own folders"] is False
    assert first["left behind"] == second["left behind"] == []
    assert list((folder / "common" / "run").iterdir()) == []


def test_files_travel_to_a_node_that_cannot_see_them(nodes):
    for name in ("full", "empty"):
        first, second = ((nodes[0] / f"node{rank}" / "files" / name).read_bytes() for rank in (0, 1))
        assert first == second


def test_resuming_without_a_shared_folder_is_refused_before_training(nodes):
    for seen in nodes[1]:
        assert "is not one folder on all 2 nodes, and checkpoint.resume=true needs" in seen["resume"]


def test_a_run_without_a_shared_folder_trains_exports_and_measures_on_every_node(nodes):
    folder, (first, second) = nodes
    assert first["acceptance length"] == second["acceptance length"] >= 1
    for name in ("model.safetensors", "config.json"):
        exported, copied = ((folder / f"node{rank}" / "run" / "draft" / name).read_bytes() for rank in (0, 1))
        assert exported == copied
    assert json.loads((folder / "node1" / "run" / "draft" / "config.json").read_text())["draft_vocab_size"] == 48
    assert {path.name for path in (folder / "node1" / "run").iterdir()} == {"draft"}
