"""The main job through its real launchers: what it leaves behind, and that a killed run goes on as if nothing had happened."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from engine import trainer as trainer_file
from engine.config.ds_config import load_ds_config
from engine.config.recipe import load_config
from engine.config.sections import Config, DataSection
from engine.data.documents import Document, DocumentList
from engine.data.packed_loader import PackedLoader
from engine.kernels import Kernels, blocked_attention
from engine.kernels.self_check import SelfCheck
from engine.parallel.mesh import World
from engine.runtime.checkpoint import Checkpoint
from engine.trainer import Trainer
from tests.distributed import ENVIRONMENT as ON_CPU
from tests.distributed import ONE_THREAD, ROOT, free_port, launch
from tests.parallel.families import tiny_model

DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
ENVIRONMENT = os.environ | ON_CPU
HARDWARE = {"gpu_utilization", "gpu_memory_gib", "gpu_power_w", "gpu_temperature_c", "gpu_clock_mhz", "pcie_gb_per_s"}
HARDWARE |= {"nvlink_gb_per_s", "cpu_utilization", "host_memory_gib", "joules_per_million_tokens", "mfu"}
TIMES = HARDWARE | {"tokens_per_s", "step_s", "parts_s", "overlap_efficiency", "memory_gib", "placement"}


def arguments(output: Path, target: Path, corpus, *overrides: str) -> list[str]:
    options = [
        f"output_dir={output}",
        f"target.path={target}",
        "target.aux_layers=[0,1,3]",
        f"data.train={corpus.train}",
        f"data.held_out={corpus.held_out}",
        "data.max_tokens=40",
        "draft.vocab_size=48",
        "ttt.steps=3",
        "evaluation.num_prompts=2",
        "evaluation.max_new_tokens=8",
        ONE_THREAD,
    ]
    return ["launcher/train.py", "--ds_config", "ds_configs/zero3.json", *options, *overrides]


def run(command: list[str], ranks: int = 1) -> str:
    result = launch(command, ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def metrics(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def num_logged(output: Path) -> int:
    """Lines of metrics so far, of a run that may be writing one."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_two_ranks_train_export_and_measure(tmp_path, tiny_target, tiny_corpus):
    """Other tests give ranks the environment that `torchrun` does."""
    command = [*DEEPSPEED, *arguments(tmp_path, tiny_target, tiny_corpus)]
    ended = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    printed = ended.stdout
    assert "reloaded: largest logit difference 0.0e+00" in printed
    rows = [line.split("  ")[0] for line in printed.splitlines() if line.rstrip().endswith("0 of 2")]
    assert rows == ["untrained draft", "trained draft", "prompt lookup"]
    assert f"Draft, ready for SGLang and vLLM: {tmp_path / 'draft'}" in printed and "Next:" in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"config.yaml", "ds_config.json", "metrics.jsonl", "summary.json"}
    assert {path.name for path in (tmp_path / "draft").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert json.loads((tmp_path / "ds_config.json").read_text())["scheduler"]["params"]["total_num_steps"] == len(lines)
    measured = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(set(line) > HARDWARE and line["mfu"] is line["gpu_power_w"] is None for line in measured)
    assert all(line["host_memory_gib"] > 0 for line in measured)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["after"]["num_prompts"] == 2 and summary["after"]["mismatches"] == 0
    (sample,) = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]  # of rank 0's prompt
    assert sample["step"] == len(lines) and sample["num_tokens"] == len(sample["tokens"]) == len(sample["depths"])
    assert sample["depths"].count(0) in (sample["num_forwards"], sample["num_forwards"] + 1), "one per forward, and the first"
    work = json.loads((tmp_path / "work.json").read_text())
    assert work["draft_ranks"] == 2 and {piece["part"] for piece in work["pieces"]} >= {"target_forward", "backward"}
    page = (tmp_path / "report.html").read_text()
    assert "Replies to held-out prompts" in page and "its peak, and the least time, are unknown" in page


def test_without_a_recipe_it_trains_for_the_embedded_target(tmp_path):
    command = ["launcher/train.py", "--ds_config", "ds_configs/zero3.json", f"output_dir={tmp_path}", ONE_THREAD]
    printed = run([*command, "max_steps=2", "evaluation.num_prompts=2", "evaluation.max_new_tokens=8"])
    assert "0 of 2" in printed
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["target"]["path"] == str(ROOT / "launcher" / "embedded" / "target")
    assert all(Path(path).is_file() for path in written["data"]["train"] + written["data"]["held_out"])
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]


def test_a_run_that_may_not_resume_leaves_the_earlier_ones_record(tmp_path, tiny_target, tiny_corpus):
    options = ("max_steps=2", "checkpoint.every_steps=1")
    ds_config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps(ds_config | {"comet": {"enabled": False, "api_key": "very-secret-key"}}))
    command = arguments(tmp_path / "run", tiny_target, tiny_corpus, *options)
    command[command.index("ds_configs/zero3.json")] = str(tmp_path / "ds.json")
    command.append("regenerate.servers=[http://user:very-secret-key@host:30000/v1]")
    assert "very-secret-key" not in run(command)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"very-secret-key" not in path.read_bytes(), path
            allowed = path.stat().st_mode & 0o666  # DeepSpeed's own script may be executed too
            assert allowed == stat.S_IMODE((tmp_path / "ds.json").stat().st_mode), path
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text())["comet"]["api_key"] == "<hidden>"
    tmp_path = tmp_path / "run"
    record = {name: (tmp_path / name).read_bytes() for name in ("config.yaml", "ds_config.json", "vocab_map.safetensors")}
    other = Path(tiny_corpus.train).read_text().replace("w1 ", "w2 ")
    (tmp_path / "other.jsonl").write_text(other)
    resume = (*options, "checkpoint.resume=true")
    for change, problem in {
        f"data.train={tmp_path / 'other.jsonl'}": "another stream of batches",
        "ttt.steps=2": "ttt.steps was 3, now 2",
    }.items():
        command = [argument for argument in arguments(tmp_path, tiny_target, tiny_corpus, *resume)]
        command = [argument for argument in command if not argument.startswith(change.split("=")[0])] + [change]
        stopped = launch(command)
        assert stopped.returncode != 0 and problem in stopped.stderr, stopped.stderr
    assert record == {name: (tmp_path / name).read_bytes() for name in record}


def test_a_folder_of_the_users_is_not_replaced(tmp_path, tiny_target, tiny_corpus):
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "letter.txt").write_text("dear reader")
    stopped = launch(arguments(tmp_path, tiny_target, tiny_corpus))
    assert stopped.returncode != 0 and "is no exported draft" in stopped.stderr
    assert (tmp_path / "draft" / "letter.txt").read_text() == "dear reader"


def test_deepspeeds_own_monitors_get_the_metrics(tmp_path, tiny_target, tiny_corpus):
    ds_config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    for monitor in ("csv_monitor", "tensorboard"):
        ds_config[monitor] = {"enabled": True, "output_path": str(tmp_path / monitor), "job_name": "draft"}
    (tmp_path / "ds.json").write_text(json.dumps(ds_config))
    options = ["max_steps=2", "evaluation.every_steps=1", "checkpoint.every_steps=1"]
    command = arguments(tmp_path / "run", tiny_target, tiny_corpus, *options)
    command[2] = str(tmp_path / "ds.json")
    run(command)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_2")  # the last step is taken and evaluated again
    run([*command, "checkpoint.resume=true"])
    expected = pytest.approx([line["loss"] for line in metrics(tmp_path / "run")], rel=1e-5)
    (written,) = (tmp_path / "csv_monitor" / "draft").glob("*train_loss.csv")
    assert [float(line.split(",")[1]) for line in written.read_text().splitlines()[1:]] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard" / "draft")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == expected
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    losses = [line["held_out_loss"] for line in evaluations]
    assert [event.value for event in events.Scalars("evaluation/held_out_loss")] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("ttt.step=5", "ttt.steps"),
        ("ttt.steps=many", "ttt.steps"),
        ("trian.path=x", "target.path"),
        ("lr=1e-3", "optimizer"),
        ("data.train=nowhere.jsonl", "no such file"),
    ],
)
def test_a_wrong_option_stops_the_run_with_one_line_before_anything_is_written(option, expected, tmp_path):
    command = [sys.executable, "launcher/train.py", "--ds_config", "ds_configs/zero3.json", f"output_dir={tmp_path / 'x'}"]
    start = time.perf_counter()
    result = subprocess.run([*command, option], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode != 0 and time.perf_counter() - start < 20
    assert result.stderr.count("\n") == 1 and expected in result.stderr, result.stderr
    assert not (tmp_path / "x").exists()


def test_a_target_that_ranks_share_teaches_the_same(tmp_path, tiny_target, tiny_corpus):
    losses = []
    summaries = []
    shared = ("parallel.tp_size=2", "overlap.check_order=true")
    colocated = (*shared, "overlap.placement=colocated", "overlap.look_ahead=2")
    for number, options in enumerate([(), (*shared, "overlap.placement=serial"), colocated]):
        folder = tmp_path / str(number)
        printed = run(arguments(folder, tiny_target, tiny_corpus, "max_steps=4", *options), ranks=2)
        assert ("shared by 2 ranks: 10 modules, 5 of them attention" in printed) is bool(options)
        summaries.append(json.loads((folder / "summary.json").read_text()))
        losses.append([line["loss"] for line in metrics(folder)])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3), "the draft rounds to bf16, other sums of the target another way"
    assert losses[2] == losses[1]
    for name in ("before", "after", "prompt_lookup"):
        alone, *shared = (summary[name] for summary in summaries)
        assert alone["tokens_per_s"] > 0 and alone["mismatches"] == 0
        for report in shared:
            assert report == alone | {"tokens_per_s": None, "plain_tokens_per_s": None, "mismatches": None}


def test_a_mixture_whose_experts_ranks_share_teaches_the_same(tmp_path, tiny_target, tiny_corpus):
    target = tmp_path / "mixture"
    losses = []
    reports = []
    tiny_model("qwen3_moe").save_pretrained(target)
    AutoTokenizer.from_pretrained(tiny_target).save_pretrained(target)
    for number, options in enumerate([(), ("parallel.ep_size=2",), ("parallel.tp_size=2", "parallel.ep_size=2")]):
        command = arguments(tmp_path / str(number), target, tiny_corpus, "max_steps=3", *options)
        printed = run([option.replace("[0,1,3]", "[0,1,2]") for option in command], ranks=2)
        assert ("experts of 3 layers by 2" in printed) is bool(options)
        losses.append([line["loss"] for line in metrics(tmp_path / str(number))])
        reports.append(json.loads((tmp_path / str(number) / "summary.json").read_text())["prompt_lookup"])
    assert all(report["acceptance_length"] == reports[0]["acceptance_length"] > 1 for report in reports)
    for shared in losses[1:]:  # the draft reads states rounded to bf16, where a last bit of fp32 may tip a rounding
        assert shared == pytest.approx(losses[0], rel=1e-3)


def test_a_plugin_that_fails_and_sizes_that_do_not_fit_are_named(tmp_path, tiny_target, tiny_corpus):
    (tmp_path / "mine.py").write_text("raise KeyError('no such family')")
    for option, problem in {
        f"target.plugins=[{tmp_path / 'mine.py'}]": "mine.py: KeyError: 'no such family'",
        f"target.plugins=[{tmp_path / 'none.py'}]": "none.py: no such file",
        "parallel.tp_size=3": "parallel.tp_size=3 does not divide 1 ranks; use one of [1]",
    }.items():
        stopped = launch(arguments(tmp_path / "run", tiny_target, tiny_corpus, option))
        assert stopped.returncode != 0 and problem in stopped.stderr and "Traceback" not in stopped.stderr, stopped.stderr


def test_a_run_goes_on_on_fewer_ranks_in_the_middle_of_an_epoch(tmp_path, tiny_target, tiny_corpus):
    options = ("epochs=2", "checkpoint.every_steps=3")
    run(arguments(tmp_path, tiny_target, tiny_corpus, *options, "max_steps=3"), ranks=2)
    printed = run(arguments(tmp_path, tiny_target, tiny_corpus, *options, "checkpoint.resume=true"))
    assert "resumed after step 3, converted from another number of ranks" in printed
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > 3
    assert "reloaded: largest logit difference 0.0e+00" in printed


@pytest.mark.parametrize(("options", "problem"), [(["epochs=1"], "epochs=1 ends"), (["epochs=2"], None), (["epochs=3"], None)])
def test_a_resumed_run_must_not_end_before_its_checkpoint(options, problem, tmp_path, capsys):
    lengths = [5, 9, 3, 7, 8]
    documents = DocumentList([Document(np.arange(n, dtype=np.int32), np.ones(n, dtype=bool), (n,)) for n in lengths])
    config = load_config(None, [f"output_dir={tmp_path}", *options])
    facts = {"packs_per_batch": 1, "rank": 0, "world_size": 1, "accumulation_steps": 1, "seed": 0, "balance_steps": 8}
    *_, (_, end_of_second) = PackedLoader(documents, max_tokens=10, epochs=2, **facts)
    trainer = Trainer(config, {}, World.alone())
    loader = PackedLoader(documents, max_tokens=10, epochs=config.epochs, **facts)
    num_steps = end_of_second["packs"]
    checkpoint = Checkpoint(tmp_path, f"step_{num_steps}", 1, num_steps, end_of_second, {}, None, is_checked=True)
    if problem is not None:
        with pytest.raises(ValueError, match=problem):
            trainer.resume(loader, checkpoint)
        return
    span = trainer.resume(loader, checkpoint)
    assert span.done == num_steps <= span.last
    assert ("no step is left to train" in capsys.readouterr().out) == (config.epochs == 2)


def test_a_kernel_that_fails_its_self_check_is_not_trained_with(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such instruction")

    def everywhere(world, cache_dir, warn):
        return SelfCheck(world.device, Path(cache_dir), world.any_rank, warn, even_on_cpu=True)

    monkeypatch.setattr(SelfCheck, "of", everywhere)
    monkeypatch.setattr(trainer_file, "choose_kernels", lambda *arguments: Kernels(broken))
    config = Config(output_dir=str(tmp_path), data=DataSection(cache_dir=str(tmp_path / "cache")))
    trainer = Trainer(config, load_ds_config(ROOT / "ds_configs/zero2.json"), World.alone())
    chosen = trainer.choose_kernels(SimpleNamespace(head_dim=16))
    assert chosen.attention is blocked_attention.ancestor_attention
    assert list((tmp_path / "cache").glob("kernels-*.json"))
