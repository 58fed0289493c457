import json
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from benchmarks import bench_overlap
from benchmarks.bench_overlap import Runner, compare, result_of
from engine.config.recipe import load_config
from engine.overlap.step_clock import DRAFT_PARTS, PARTS, TARGET_FORWARD


def fake_training(command, **options):
    """Stands for `train.py`: checks the options, and writes the metrics of a run whose layers take 10 ms each."""
    config = load_config(None, [word for word in command if "=" in word])
    layers = AutoConfig.from_pretrained(config.target.path).num_hidden_layers
    ranks = int(command[command.index("--nproc-per-node") + 1])
    parts = dict.fromkeys(PARTS, 0.0) | {TARGET_FORWARD: 0.01 * layers, DRAFT_PARTS[1]: 0.2}
    step_s = {"serial": 0.01 * layers + 0.2, "split": 0.21, "colocated": 0.4}[config.overlap.placement]
    assert (config.overlap.target_ranks is not None) == (config.overlap.placement == "split") == (ranks == 2 and step_s == 0.21)
    lines = [json.dumps({"step": step, "step_s": step_s, "parts_s": parts}) for step in range(1, config.max_steps + 1)]
    folder = bench_overlap.Path(config.output_dir)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def test_every_placement_is_measured_with_a_target_as_expensive_as_the_draft(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_overlap, "subprocess", SimpleNamespace(run=fake_training, DEVNULL=None))
    results = compare(tmp_path, steps=30, max_tokens=256)
    assert [(result["placement"], result["look_ahead"]) for result in results] == [
        ("serial", 0),
        *(("split", look_ahead) for look_ahead in bench_overlap.LOOK_AHEADS),
        ("colocated", 1),
    ]
    assert all(result["target_s"] == pytest.approx(0.2) and result["draft_s"] == pytest.approx(0.2) for result in results)
    assert results[0]["efficiency"] == pytest.approx(0.0) and results[0]["predicted_step_s"] == pytest.approx(0.4)
    assert results[2]["over_longer_side"] == pytest.approx(1.05) and results[2]["efficiency"] == pytest.approx(0.95)
    assert results[1]["predicted_step_s"] == pytest.approx(0.4) and results[2]["predicted_step_s"] == pytest.approx(0.2)
    assert results[-1]["step_s"] == pytest.approx(0.2), "a step of two ranks trains on two micro-batches"
    assert Runner(tmp_path, 1, 1)._target(20).exists()


def test_a_result_has_the_keys_that_are_read_elsewhere():
    result = result_of("split", 2, 1.0, {"target_s": 0.9, "draft_s": 1.0}, 1.1)
    assert {"placement", "look_ahead", "step_s", "target_s", "draft_s", "efficiency"} <= set(result)
