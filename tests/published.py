"""Changes to a published target's folder: its config, and its weights in one safetensors file."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.weights.weight_files import SINGLE

Weights = dict[str, torch.Tensor]


def change_config(folder: Path, **values: object) -> None:
    """Set keys of `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_weights(folder: Path, change: Callable[[Weights], Weights | None]) -> None:
    """Replace the weights by what `change` returns, or by those given if it changes them in place and returns None."""
    weights = load_file(folder / SINGLE)
    changed = change(weights)
    save_file(weights if changed is None else changed, folder / SINGLE, {"format": "pt"})
