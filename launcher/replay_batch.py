"""Replay the documents of a bad step one by one: python launcher/replay_batch.py RUN RUN/bad_steps/step_12_rank_0.json

A run lists the documents of each step whose loss or gradient was not finite. This command loads the
run's target and the draft of a checkpoint on one rank, and shows for each document alone where the
target's states, the loss or the gradient stop being finite.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from engine.config.ds_config import compute_dtype
from engine.config.recipe import load_config
from engine.config.sections import CHECKPOINTS, RECIPE, Config, ParallelSection
from engine.config.strict import parse_json, read_text
from engine.data.fingerprint import tokenizer_hash
from engine.data.templates import load_tokenizer
from engine.hidden_states.micro_batches import MicroBatchMaker
from engine.hidden_states.sources import open_source
from engine.host.telemetry import Telemetry, visible
from engine.kernels import Kernels, choose_kernels
from engine.models.draft_folder import VOCAB, load_vocab_map
from engine.parallel.mesh import World
from engine.parallel.zero_checkpoint import consolidated_weights
from engine.runtime.bad_step import BadStep, Replay, Replayed
from engine.runtime.checkpoint import Checkpoints
from engine.target.configuration import load_target_config
from launcher.command import TRUST, check_run, method_of_run, run_plugins, stopping_at_errors, user_cache


def parse_arguments() -> argparse.Namespace:
    verbatim = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=verbatim, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir of the run")
    parser.add_argument("step", type=Path, metavar="FILE", help="list of a bad step, from the run's folder bad_steps")
    parser.add_argument(
        "--tag", help="checkpoint whose draft is used, such as step_500; default: the newest, or an untrained draft"
    )
    parser.add_argument("--plugins", nargs="+", default=(), metavar="FILE", help="Python files that the run has used")
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST)
    return parser.parse_args()


def config_of(run: Path, trust_remote_code: bool) -> Config:
    """Return the recipe of a run for one rank. Raises ValueError if the folder is no run."""
    check_run(run)
    config = load_config(run / RECIPE)
    target = replace(config.target, trust_remote_code=trust_remote_code)
    data = replace(config.data, cache_dir=config.data.cache_dir or str(user_cache()))
    return replace(config, target=target, data=data, parallel=ParallelSection())


def replay(arguments: argparse.Namespace, telemetry: Telemetry) -> list[Replayed]:
    """Replay the step and return what its documents give. Raises ValueError for what a user can fix."""
    step = BadStep.read(arguments.step)
    config = config_of(arguments.run, arguments.trust_remote_code)
    run_plugins(arguments.plugins, "--plugins")
    world = World.alone()
    found = None if arguments.tag else Checkpoints(arguments.run / CHECKPOINTS).find(telemetry.warn)
    tag = arguments.tag or (None if found is None else found.tag)
    if tag is not None:  # its weights replace those that the run began with
        config = replace(config, draft=replace(config.draft, init_from=None))
    method = method_of_run(config, arguments.plugins)
    tokenizer = load_tokenizer(config.target, config.data)
    source = open_source(config, tokenizer, world, telemetry)
    draft_config = method.derive_config(load_target_config(config.target), source.aux_layers, source.trained_with)
    assert draft_config.aux_layers is not None  # `derive_config` fills them in
    documents = source.documents()
    target = source.load_target(draft_config.aux_layers)
    vocab_map = load_vocab_map(arguments.run / VOCAB, tokenizer_hash(tokenizer)).to(world.device)
    ds_config = parse_json(read_text(arguments.run / "ds_config.json"), arguments.run / "ds_config.json")
    dtype = getattr(torch, compute_dtype(ds_config))
    kernels = choose_kernels(config.kernels, world.device, dtype, draft_config.head_dim, Kernels(recompute=method.recompute))
    draft = method.new_draft(draft_config, kernels, target, vocab_map)
    if tag is not None:
        draft.load_state_dict(consolidated_weights(arguments.run / CHECKPOINTS, tag))
    telemetry.note(
        f"Step {step.step} of rank {step.rank}: {step.reason}. With the draft of {tag or 'no checkpoint, untrained'}:"
    )
    make = MicroBatchMaker(method, target, dtype, world.device)
    objective = method.make_objective(target, vocab_map)
    replayed = Replay(documents, make, draft.to(dtype), objective, draft_config.aux_layers)
    return list(replayed(step))


def show(results: list[Replayed], telemetry: Telemetry) -> None:
    """Print a line per document."""
    table = Table("document", "tokens", "target's states", "loss by TTT step", "gradient", box=None, padding=(0, 2, 0, 0))
    for result in results:
        losses = " ".join(f"{loss:.3g}" for loss in result.loss_S)
        style = "red" if result.is_bad else None
        states = "finite" if result.fault is None else f"not finite in {result.fault}"
        name = visible(result.name)
        table.add_row(name, f"{result.num_tokens:,}", states, losses, f"{result.grad_norm:.3g}", style=style)
    telemetry.console.print(table)
    num_bad = sum(result.is_bad for result in results)
    if num_bad:
        telemetry.note(f"{num_bad} of {len(results)} documents are bad alone.")
    else:
        telemetry.note("No document is bad alone: the weights had diverged by then, or the sum of their gradients overflows.")


def main() -> None:
    arguments = parse_arguments()
    telemetry = Telemetry(speaks=True)
    with stopping_at_errors(rank=0):
        results = replay(arguments, telemetry)
    show(results, telemetry)


if __name__ == "__main__":
    main()
