"""A target's identity changes when its weights or its config do, and costs a few samples of each file."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.sections import TargetSection
from engine.parallel.mesh import World
from engine.target import identity as identity_file
from engine.target.identity import sampled_ranges, shared_identity, target_identity, what_changed
from engine.weights.weight_files import SINGLE
from tests.distributed import run_ranks
from tests.parallel.families import tiny_model
from tests.published import change_config


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def copied(published, tmp_path) -> Path:
    return shutil.copytree(published, tmp_path / "target")


def identity_of(folder: Path) -> str:
    return target_identity(TargetSection(path=str(folder)))


def test_a_copy_has_the_same_identity_whoever_wrote_its_config(published, copied):
    before = identity_of(published)
    change_config(copied, transformers_version="1.0", dtype="bfloat16")
    assert identity_of(copied) == before and what_changed(before, identity_of(copied)) is None


def test_a_value_in_any_shard_changes_the_weights_part(published, copied):
    seen = {identity_of(published)}
    shards = sorted(copied.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        weights = load_file(shard)
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, shard, {"format": "pt"})
        assert what_changed(identity_of(published), identity_of(copied)) == "the target's weights differ"
        seen.add(identity_of(copied))
    assert len(seen) == len(shards) + 1


def test_a_config_of_another_meaning_changes_its_own_part(published, copied):
    change_config(copied, rope_theta=5e5)
    assert what_changed(identity_of(published), identity_of(copied)) == "the target's config.json differs"
    (copied / "hf_quant_config.json").write_text("{}")
    assert identity_of(copied) != identity_of(published)


def test_what_is_not_known_is_no_change():
    assert what_changed(None, "a-b") is None and what_changed("a-b", None) is None
    assert what_changed("a-b", "c-d") == "the target's weights and config.json differ"


@pytest.mark.parametrize("num_bytes", [1, 5_000_000, 7_000_001, 5 << 30])
def test_samples_lie_within_a_file_reach_both_ends_and_are_few(num_bytes):
    ranges = sampled_ranges(100, 100 + num_bytes)
    assert ranges[0][0] == 100 and ranges[-1][1] == 100 + num_bytes
    assert all(first < end for first, end in ranges)
    assert sum(end - first for first, end in ranges) <= 4 << 20
    gaps = [later[0] - earlier[1] for earlier, later in zip(ranges[:-1], ranges[1:], strict=True)]
    assert all(gap <= num_bytes // 255 for gap in gaps)


def test_a_tensor_as_large_as_a_gap_is_always_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(identity_file, "SAMPLE_BYTES", 64)
    weights = {f"{number:03}": torch.zeros(1000) for number in range(40)}  # 4,000 bytes of 160,000; gaps are 627
    (tmp_path / "config.json").write_text("{}")
    save_file(weights, tmp_path / SINGLE)
    seen = {identity_of(tmp_path)}
    for name in weights:
        save_file(weights | {name: torch.ones(1000)}, tmp_path / SINGLE)
        seen.add(identity_of(tmp_path))
    assert len(seen) == 41


def test_pickled_weights_have_an_identity(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    seen = set()
    for value in (0.0, 1.0):
        torch.save({"a": torch.full((100,), value)}, tmp_path / "pytorch_model.bin")
        seen.add(identity_of(tmp_path))
    assert len(seen) == 2


def test_a_cut_file_is_refused_by_name(copied):
    shard = sorted(copied.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard.name} is not whole"):
        shared_identity(TargetSection(path=str(copied)), World.alone())


def identities_on_two_nodes(world: World, cases: list[tuple[str, str]]) -> list[str]:
    """Every rank is a node of its own here, with a folder of its own."""
    node = World(world.rank, world.size, local_rank=0, local_size=1)
    found = []
    for folders in cases:
        try:
            found.append(shared_identity(TargetSection(path=folders[world.rank]), node))
        except ValueError as error:
            found.append(f"refused: {error}")
    return found


def test_nodes_with_other_weights_are_refused_on_every_rank(published, copied, tmp_path):
    change_config(copied, rope_theta=5e5)
    expected = {
        (str(published), str(published)): identity_of(published),
        (str(published), str(copied)): "config.json differs on the node of rank 1 compared with that of rank 0",
        (str(published), str(tmp_path)): "refused: rank 1: target.path=",
    }
    for results in run_ranks(identities_on_two_nodes, 2, list(expected)):
        for result, part in zip(results, expected.values(), strict=True):
            assert part in result
