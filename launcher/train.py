"""Train a draft: deepspeed launcher/train.py --ds_config ds_configs/zero3.json [--recipe FILE] [section.key=value ...]

Runs under `deepspeed`, `torchrun` and plain `python`. Without a recipe it trains a draft for the
embedded target on CPython's own documentation, which needs no network and no GPU. With
target.store=FOLDER it trains from the hidden states that capture_hidden_states.py wrote to that
folder, and loads no target.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.config.ds_config import accumulation_steps, compute_dtype, load_ds_config
from engine.config.recipe import load_config
from engine.config.sections import DRAFT_METHODS, Config, ConfigError
from launcher.command import (
    check_inputs,
    check_output,
    end_process,
    join_environment,
    make_parser,
    order_launches,
    run_plugins,
    shipped_ds_config,
    stop,
    with_paths,
    with_store,
    write_embedded_corpus,
    wrong_options,
)

if TYPE_CHECKING:
    from torch.distributed import Store


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--ds_config",
        type=shipped_ds_config,
        required=True,
        help="DeepSpeed's JSON (batch sizes, optimizer, precision, ZeRO), or the name of a shipped one, such as zero2",
    )
    return parser.parse_intermixed_args()


def check_files(config: Config) -> None:
    """Raise ConfigError if a file in the configuration is missing or `output_dir` is unusable."""
    store = config.target.store
    if store is None:
        check_inputs(config, reads_prompts=True)
    elif not Path(store).is_dir():
        problem = "no such folder; write one with launcher/capture_hidden_states.py"
        raise ConfigError(problem, key="target.store", value=store)
    check_output(config)


def sides_of(config: Config, num_ranks: int) -> tuple[int, int] | None:
    """Return the numbers of ranks that train the draft and that run the target; None = the same ranks do both.

    Raises ConfigError if the ranks cannot be divided so.
    """
    num_target = config.overlap.target_ranks
    if num_target is None:
        return None
    key = "overlap.target_ranks"
    if num_target >= num_ranks:
        raise ConfigError(f"leaves no rank for the draft; the job has {num_ranks} ranks", key=key, value=num_target)
    if num_target % config.replica_size:
        problem = f"is not a multiple of the {config.replica_size} ranks that share one copy of the target"
        raise ConfigError(problem, key=key, value=num_target)
    return num_ranks - num_target, num_target


def main() -> None:
    arguments = parse_arguments()
    environment = join_environment()
    with wrong_options(arguments, environment["rank"]):
        config = load_config(arguments.recipe, arguments.overrides)
        ds_config = load_ds_config(arguments.ds_config)
        sides = sides_of(config, environment["size"])
        accumulation_steps(ds_config, environment["size"] if sides is None else sides[0])
        check_files(config)
        if config.overlap.priority == "draft" and compute_dtype(ds_config) == "float16":
            problem = "is not possible in fp16, whose check for overflow DeepSpeed runs on the default stream; use bf16"
            raise ConfigError(problem, key="overlap.priority", value="draft")
    corpus = Path(config.output_dir).absolute() / "corpus"
    resolved = with_paths(config, corpus)
    try:
        resolved = with_store(resolved)
    except ValueError as error:
        stop(error, environment["rank"])
    order_launches(config)

    from engine.overlap.placement import check_colocated
    from engine.parallel.mesh import World

    whole = World(**environment)
    with wrong_options(arguments, whole.rank):
        check_colocated(config.placement, config.replica_size, whole.device)

    from engine.overlap.bridge import Bridge, OtherSideError, Sides, join_sides
    from engine.parallel.zero import connect, disconnect

    def join(own: World, store: "Store | None" = None) -> None:
        # DeepSpeed reads these; with a store they are those of one side.
        os.environ.update(RANK=str(own.rank), WORLD_SIZE=str(own.size))
        connect(own, config.parallel.timeout_s, config.parallel.cpu_threads, store)

    world = whole
    bridge: Bridge | None = None
    if sides is None:
        join(world)
    else:
        world, bridge = join_sides(whole, Sides(*sides, config.replica_size), config.parallel.timeout_s, join)
    from engine.parallel.nodes import is_shared
    from engine.runtime.target_server import TargetServer
    from engine.trainer import Trainer

    report = None
    try:
        run_plugins(config.target.plugins)
        if bridge is not None and bridge.sides.is_target(whole.rank):
            bridge.barrier()
            TargetServer(resolved, ds_config, world, bridge).run()
        else:
            world = replace(world, shares_output=is_shared(Path(config.output_dir).absolute(), world))
            with wrong_options(arguments, world.rank):
                trainer = Trainer(resolved, ds_config, world, bridge)
            if world.writes_output:
                write_embedded_corpus(config, corpus)
            world.barrier()
            if bridge is not None:
                bridge.barrier()
            report = trainer.run()
            if world.is_main:
                report.save()
    except (ValueError, OSError, ImportError, OtherSideError) as error:
        stop(error, whole.rank)
    if report is not None and world.is_main:
        report.show(trainer.telemetry.console, config.target.plugins, config.draft.method in DRAFT_METHODS)
    disconnect()


if __name__ == "__main__":
    main()
    end_process()
