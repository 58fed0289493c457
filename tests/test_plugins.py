"""Files outside the engine add a draft method, a loss and a source of hidden states, and the main job trains with them."""

import builtins
import inspect
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from engine.config.recipe import load_config
from engine.config.sections import Config, ConfigError, DraftSection, TargetSection
from engine.data.documents import Document
from engine.data.packing import collate
from engine.kernels import PLAIN
from engine.models.method_registry import make_method
from engine.models.vocab_map import VocabMap
from launcher.capture_hidden_states import check_files
from launcher.command import run_plugins
from tests.distributed import ONE_THREAD, launch
from tests.plugins.reverse_kl_on_noisy_states import reverse_kl

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "tests" / "plugins" / "reverse_kl_on_noisy_states.py"
HEADS = ROOT / "tests" / "plugins" / "independent_heads.py"
OF_HEADS = (
    f"target.plugins=[{HEADS}]",
    "draft.method=independent_heads",
    "draft.options={num_heads: 4}",
    "data.max_tokens=512",
    ONE_THREAD,
)


def launch_script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return launch([f"launcher/{name}.py", *options])


def train(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return launch_script("train", "--ds_config", "ds_configs/zero0.json", f"output_dir={output}", *options)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Options that train on what Python's types document, in the words of the embedded target; its whole corpus takes long."""
    lines = []
    for owner in (builtins, str, bytes, list, dict, set, int, float, bytearray, frozenset):
        for name, member in vars(owner).items():
            text = inspect.getdoc(member) or ""
            turns = [("user", f"What does {owner.__name__}.{name} do?"), ("assistant", text[:600])]
            if len(text) > 40:
                lines.append(json.dumps({"conversations": [{"role": role, "content": said} for role, said in turns]}) + "\n")
    folder = tmp_path_factory.mktemp("data")
    for name, part in {"train": lines[::2] + lines[1::4], "held_out": lines[3::4]}.items():
        (folder / name).write_text("".join(part), encoding="utf-8")
    return [f"data.{name}={folder / name}" for name in ("train", "held_out")]


@pytest.fixture(scope="module")
def heads_run(tmp_path_factory, data) -> Path:
    """A run of the method with independent heads: zero-3, measured before and after training."""
    output = tmp_path_factory.mktemp("heads") / "run"
    measured = ["evaluation.num_prompts=4", "evaluation.max_new_tokens=24", "evaluation.num_steps=4"]
    learning = ["--ds_config", "ds_configs/zero3.json", "epochs=2", "max_steps=60", "checkpoint.every_steps=60"]
    done = launch_script("train", f"output_dir={output}", *OF_HEADS, *data, *measured, *learning)
    assert done.returncode == 0, done.stderr
    return output


def test_a_method_of_another_shape_learns_and_drafts_what_the_target_accepts(heads_run):
    lines = [json.loads(line) for line in (heads_run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines[0]["loss_per_step"]) == 4
    assert lines[-1]["loss"] < lines[0]["loss"]
    summary = json.loads((heads_run / "summary.json").read_text())
    assert summary["after"]["acceptance_length"] > max(1.0, summary["before"]["acceptance_length"])
    assert summary["after"]["mismatches"] == 0
    exported = json.loads((heads_run / "draft" / "config.json").read_text())
    assert exported["architectures"] == ["IndependentHeadsDraft"]
    assert len(exported["aux_layers"]) == 1


def test_an_exported_draft_of_a_plugin_is_measured_and_exported_again(heads_run, tmp_path):
    written = tmp_path / "measured.json"
    command = ["--draft", str(heads_run / "draft"), "--json", str(written)]
    refused = launch_script("measure_acceptance", *command)
    assert refused.returncode != 0, "a plugin runs only if the command line names it"
    assert "draft.method = independent_heads: expected eagle3" in refused.stderr and "The run had plugins" in refused.stderr
    assert f"--plugins {HEADS}" in refused.stderr
    measured = launch_script("measure_acceptance", *command, "--plugins", str(HEADS))
    assert measured.returncode == 0, measured.stderr
    report = json.loads(written.read_text())["draft"]
    assert report["acceptance_length"] == json.loads((heads_run / "summary.json").read_text())["after"]["acceptance_length"]

    again = ["--run", str(heads_run), "--output", str(tmp_path / "again"), "--plugins", str(HEADS)]
    exported = launch_script("export_draft", *again)
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "again" / "config.json").read_text() == (heads_run / "draft" / "config.json").read_text()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (heads_run / "draft" / "model.safetensors").read_bytes()


def test_a_store_of_one_layer_is_captured_for_a_method_and_trained_from(data, tmp_path):
    lines = Path(data[0].partition("=")[2]).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:30]), encoding="utf-8")
    few = [*OF_HEADS, f"data.train={tmp_path / 'few.jsonl'}", data[1], "evaluation.num_prompts=0"]
    captured = launch_script("capture_hidden_states", *few, f"target.store={tmp_path / 'store'}")
    assert captured.returncode == 0, captured.stderr
    contents = json.loads((tmp_path / "store" / "manifest.json").read_text())["contents"]
    assert len(contents["aux_layers"]) == 1

    losses = []
    for name, source in (("online", []), ("offline", [f"target.store={tmp_path / 'store'}"])):
        done = train(tmp_path / name, *few, *source, "max_steps=3")
        assert done.returncode == 0, done.stderr
        metrics = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in metrics])
    assert len(losses[0]) > 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@dataclass(frozen=True)
class TablesOf:
    """The head of a target of zeros."""

    config: object

    def head_rows(self, target_ids_U: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(weight_VD=torch.zeros(len(target_ids_U), self.config.hidden_size))


def test_a_plan_and_statistics_are_those_of_the_method():
    recipe = load_config(None, [*OF_HEADS, "target.aux_layers=[2]", "draft.vocab_size=100"])
    run_plugins(recipe.target.plugins)
    method = make_method(recipe)
    target = AutoConfig.for_model("llama", hidden_size=64, num_hidden_layers=8, vocab_size=500)
    config = method.derive_config(target, recipe.target.aux_layers)
    assert config.aux_layers == (2,)
    batch = collate([Document(np.zeros(30, np.int32), np.arange(30) >= 10, (30,))])
    counts = method.count_work(batch, method.allowed_rows(batch))
    assert (counts.rows_S, counts.num_slots) == ((30, 30, 30, 30), 19)
    vocab_map = VocabMap.most_frequent(torch.arange(500), config.draft_vocab_size)
    draft = method.new_draft(config, PLAIN, TablesOf(config), vocab_map)
    assert method.count_weights(config) == sum(weight.numel() for weight in draft.parameters())
    by_head = 6 * 4 * 30 * (2 * 64 * 64 + 64 * config.draft_vocab_size)  # forward, weight gradient, at most the input's
    assert 0.6 * by_head < method.step_flops(config, counts) < 1.1 * by_head
    with pytest.raises(ValueError, match="aux_layers"):
        method.choose_aux_layers(target, (1, 2))


@pytest.mark.parametrize(
    "options, key", [({"num_head": 2}, "did you mean 'num_heads'"), ({"num_heads": "two"}, "expected int")]
)
def test_a_wrong_option_of_a_method_is_refused(options, key):
    run_plugins([str(HEADS)])
    recipe = Config(
        target=TargetSection(plugins=(str(HEADS),)), draft=DraftSection(method="independent_heads", options=options)
    )
    with pytest.raises(ConfigError, match=key) as error:
        make_method(recipe)
    assert str(error.value).startswith("draft.options.")


def test_an_option_that_a_method_does_not_read_is_refused():
    run_plugins([str(HEADS)])
    with pytest.raises(ConfigError, match="draft.num_layers = 2: has no effect on independent heads"):
        make_method(load_config(None, [*OF_HEADS, "draft.num_layers=2"]))
    with pytest.raises(ConfigError, match="draft.options = .*: has no effect on EAGLE-3"):
        make_method(load_config(None, ["draft.options={num_heads: 2}"]))


def test_a_loss_and_a_source_of_a_plugin_train_a_draft(data, tmp_path):
    options = [
        *data,
        "data.max_tokens=256",
        "max_steps=6",
        "ttt.steps=2",
        "loss.kind=reverse_kl",
        "target.source=noisy",
        ONE_THREAD,
    ]
    done = train(tmp_path / "run", f"target.plugins=[{PLUGIN}]", *options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (tmp_path / "run" / "draft" / "model.safetensors").is_file()

    unknown = train(tmp_path / "other", *data, f"target.plugins=[{PLUGIN}]", "target.source=nosy")
    assert unknown.returncode != 0 and "target.source = nosy" in unknown.stderr and "did you mean 'noisy'?" in unknown.stderr


def test_a_capture_refuses_another_source_than_the_target(tmp_path):
    config = load_config(None, [f"target.plugins=[{PLUGIN}]", "target.source=noisy", f"target.store={tmp_path / 'store'}"])
    with pytest.raises(ConfigError, match="target.source = noisy"):
        check_files(config)


def test_the_guide_shows_the_plugins_that_are_tested():
    blocks = (ROOT / "docs" / "extending.md").read_text().split("```python\n")[1:]
    assert len(blocks) == 8
    plugins = PLUGIN.read_text() + HEADS.read_text()
    assert all(block.partition("```")[0].strip() in plugins for block in blocks)


def test_without_the_plugin_its_loss_is_refused():
    with pytest.raises(ConfigError, match="target.plugins") as error:
        load_config(None, ["loss.kind=reverse_kl"])
    assert str(error.value).startswith("command line: loss.kind = reverse_kl")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_derivative_of_the_documented_loss_is_right(seed):
    g = torch.Generator().manual_seed(seed)
    p_kU = torch.randn(3, 7, generator=g, dtype=torch.float64).softmax(-1)
    log_q_kU = torch.randn(3, 7, generator=g, dtype=torch.float64).log_softmax(-1).requires_grad_()
    loss_k, slope_kU = reverse_kl(p_kU, log_q_kU)
    (by_log_q_kU,) = torch.autograd.grad(loss_k.sum(), log_q_kU)
    torch.testing.assert_close((slope_kU * log_q_kU.exp()).detach(), by_log_q_kU, rtol=1e-9, atol=1e-12)
