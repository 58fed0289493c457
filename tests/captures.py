"""Captures of a tiny target, small enough that a store of a few kilobytes has many shards."""

from pathlib import Path
from unittest import mock

import torch

from engine.config.recipe import load_config
from engine.config.sections import Config
from engine.hidden_states import capture
from engine.hidden_states.store_format import plan_shards
from engine.parallel.mesh import World

torch.set_num_threads(1)  # as ranks have: another number of threads may round the target's sums differently

SHARD_BYTES = 5_000  # one or two of the corpus's documents in fp32


def capture_config(store: Path, target: Path, train: str, *overrides: str) -> Config:
    options = [f"target.store={store}", f"target.path={target}", "target.aux_layers=[0,1,3]", f"data.train={train}"]
    return load_config(None, [*options, "data.max_tokens=40", "draft.vocab_size=48", *overrides])


def run_capture(config: Config, world: World | None = None) -> capture.CaptureReport:
    """The capture in this process, with shards of `SHARD_BYTES`."""

    def small(num_tokens, num_slots, contents, shard_bytes):
        return plan_shards(num_tokens, num_slots, contents, SHARD_BYTES)

    with mock.patch.object(capture, "plan_shards", small):
        return capture.Capture(config, world or World.alone()).run()
