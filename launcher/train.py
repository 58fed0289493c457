"""Train a draft: deepspeed launcher/train.py --ds_config ds_configs/zero3.json [--recipe FILE] [section.key=value ...]

Runs under `deepspeed`, `torchrun` and plain `python`. Without a recipe it trains a draft for the
embedded target on CPython's own documentation, which needs no network and no GPU. With
target.store=FOLDER it trains from the hidden states that capture_hidden_states.py wrote to that
folder, and loads no target.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.config.ds_config import accumulation_steps, load_ds_config
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


def main() -> None:
    arguments = parse_arguments()
    environment = join_environment()
    with wrong_options(arguments, environment["rank"]):
        config = load_config(arguments.recipe, arguments.overrides)
        ds_config = load_ds_config(arguments.ds_config)
        accumulation_steps(ds_config, environment["size"])
        check_files(config)
    corpus = Path(config.output_dir).absolute() / "corpus"
    resolved = with_paths(config, corpus)
    try:
        resolved = with_store(resolved)
    except ValueError as error:
        stop(error, environment["rank"])

    order_launches(config)

    from engine.overlap.placement import check_colocated
    from engine.parallel.mesh import World

    world = World(**environment)
    with wrong_options(arguments, world.rank):
        check_colocated(config.placement, config.target_ranks, world.device)

    from engine.parallel.zero import connect, disconnect

    connect(world, config.parallel.timeout_s, config.parallel.cpu_threads)
    from engine.parallel.nodes import is_shared
    from engine.trainer import Trainer

    world = replace(world, shares_output=is_shared(Path(config.output_dir).absolute(), world))
    try:
        run_plugins(config.target.plugins)
        with wrong_options(arguments, world.rank):
            trainer = Trainer(resolved, ds_config, world)
        if world.writes_output:
            write_embedded_corpus(config, corpus)
        world.barrier()
        report = trainer.run()
        if world.is_main:
            report.save()
    except (ValueError, OSError, ImportError) as error:
        stop(error, world.rank)
    if world.is_main:
        report.show(trainer.telemetry.console, config.target.plugins, config.draft.method in DRAFT_METHODS)
    disconnect()


if __name__ == "__main__":
    main()
    end_process()
