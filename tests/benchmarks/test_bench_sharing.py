"""What the benchmark of a shared target says is sent is what torch's process groups are given, and what theory says."""

from dataclasses import replace

import pytest
import torch

from benchmarks.bench_sharing import Watch, measure, meshes
from benchmarks.bench_target import random_model
from engine.parallel.experts import Record
from engine.parallel.mesh import TargetMesh
from engine.target.frozen import FrozenTarget
from tests.benchmarks.test_bench_target import ON_CPU, SHAPES
from tests.collectives import CountCollectives
from tests.distributed import run_ranks


def watched(world, family: str, sizes: tuple[int, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that a rank sends in a forward by kind, and those of whole collectives, counted below."""
    shape = replace(SHAPES[family], seed=world.rank)
    target = FrozenTarget(random_model(shape.config, ON_CPU), None, mesh=TargetMesh.make(world, *sizes))
    with CountCollectives() as count, Watch(ON_CPU.device) as watch:
        target(shape.batch, shape.slots_N)
    whole = {}
    for _, name, size in count.issued.calls:
        whole[name] = whole.get(name, 0) + size
    return {kind: sent.num_bytes for kind, sent in watch.sent.items()}, whole


def test_what_is_watched_is_all_that_is_sent():
    sent, whole = run_ranks(watched, 2, "llama", (2, 1))[0]
    assert sent["all-gather"] * 2 == whole["_allgather_base_"]
    assert sent["reduce-scatter"] * 2 == whole["_reduce_scatter_base_"]
    assert sent["all-reduce"] == whole["allreduce_"]
    objects = {name for name in whole if name not in ("_allgather_base_", "_reduce_scatter_base_", "allreduce_")}
    assert objects == {"allgather_"}, "lengths and counts"


def test_tensor_parallelism_sends_what_theory_says():
    (row,) = run_ranks(measure, 2, {"llama": SHAPES["llama"]}, 1)[1]
    sent = {sent["collective"]: sent for sent in row["collectives"]}
    of_ids = SHAPES["llama"].num_tokens * 8  # which the embedding gathers
    assert sent["all-gather"]["bytes"] - of_ids == sent["all-gather"]["theory_bytes"] > 0
    assert sent["reduce-scatter"]["bytes"] == sent["reduce-scatter"]["theory_bytes"] > 0
    assert 0 < row["in_collectives_ms"] < row["ms"]
    assert row["alone_ms"] > 0


def test_experts_are_sent_the_rows_that_are_counted():
    shape = SHAPES["qwen3_moe"]
    rows = run_ranks(measure, 2, {"moe": shape}, 1)[0]
    assert [(row["tp_size"], row["ep_size"]) for row in rows] == meshes(2, has_experts=True) == [(1, 2), (2, 1), (2, 2)]
    config = shape.config
    for row in rows:
        if row["ep_size"] == 1:
            assert row["rows"] == row["even_rows"] == 0
            continue
        (sent,) = [sent for sent in row["collectives"] if sent["collective"] == "all-to-all"]
        there = Record(config.hidden_size, torch.float32, config.num_experts_per_tok, is_fp8=False).num_bytes
        back = config.hidden_size * 4
        of_counts = config.num_hidden_layers * 2 * 8  # how many rows and choices follow
        assert sent["bytes"] == row["rows"] * (there + back) + of_counts
        assert row["rows"] == pytest.approx(row["even_rows"], rel=0.3)
        assert row["rows"] <= row["most_rows"] <= config.num_hidden_layers * shape.num_tokens
