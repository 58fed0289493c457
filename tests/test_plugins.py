"""A file outside the engine adds a loss and a source of hidden states, and the main job trains with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.config.recipe import load_config
from engine.config.sections import ConfigError
from launcher.capture_hidden_states import check_files
from tests.plugins.reverse_kl_on_noisy_states import reverse_kl

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "tests" / "plugins" / "reverse_kl_on_noisy_states.py"


def train(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher/train.py", "--ds_config", "ds_configs/zero0.json", f"output_dir={output}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_loss_and_a_source_of_a_plugin_train_a_draft(tmp_path):
    options = ["data.max_tokens=256", "max_steps=6", "ttt.steps=2", "loss.kind=reverse_kl", "target.source=noisy"]
    done = train(tmp_path / "run", f"target.plugins=[{PLUGIN}]", *options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (tmp_path / "run" / "draft" / "model.safetensors").is_file()

    unknown = train(tmp_path / "other", f"target.plugins=[{PLUGIN}]", "target.source=nosy")
    assert unknown.returncode != 0 and "target.source = nosy" in unknown.stderr and "did you mean 'noisy'?" in unknown.stderr


def test_a_capture_refuses_another_source_than_the_target(tmp_path):
    config = load_config(None, [f"target.plugins=[{PLUGIN}]", "target.source=noisy", f"target.store={tmp_path / 'store'}"])
    with pytest.raises(ConfigError, match="target.source = noisy"):
        check_files(config)


def test_the_guide_shows_the_plugin_that_is_tested():
    blocks = (ROOT / "docs" / "extending.md").read_text().split("```python\n")[1:]
    assert len(blocks) == 2
    assert all(block.partition("```")[0].strip() in PLUGIN.read_text() for block in blocks)


def test_without_the_plugin_its_loss_is_refused(tmp_path):
    done = train(tmp_path / "run", "loss.kind=reverse_kl")
    assert done.returncode != 0 and "loss.kind = reverse_kl" in done.stderr and "target.plugins" in done.stderr


@pytest.mark.parametrize("seed", [0, 1])
def test_the_derivative_of_the_documented_loss_is_right(seed):
    g = torch.Generator().manual_seed(seed)
    p_kU = torch.randn(3, 7, generator=g, dtype=torch.float64).softmax(-1)
    log_q_kU = torch.randn(3, 7, generator=g, dtype=torch.float64).log_softmax(-1).requires_grad_()
    loss_k, slope_kU = reverse_kl(p_kU, log_q_kU)
    (by_log_q_kU,) = torch.autograd.grad(loss_k.sum(), log_q_kU)
    torch.testing.assert_close((slope_kU * log_q_kU.exp()).detach(), by_log_q_kU, rtol=1e-9, atol=1e-12)
