"""Train an EAGLE-3 draft: deepspeed launcher/train.py --ds_config ds_configs/zero3.json [--recipe FILE] [section.key=value ...]

Runs under `deepspeed`, `torchrun` and plain `python`. Without a recipe it trains a draft for the embedded target on CPython's
own documentation; that needs no network and no GPU.
"""

import argparse
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.config import CHECKPOINTS, EMBEDDED, Config, ConfigError
from engine.ds_config import accumulation_steps, load_ds_config
from engine.recipe import COMMAND_LINE, describe_options, load_config

DEFAULT_RECIPE = ROOT / "launcher" / "recipes" / "embedded.yaml"
SECONDS_FOR_RANK_0 = 3  # launchers end a job within about a second of its first failure
EMBEDDED_TARGET = ROOT / "launcher" / "embedded" / "target"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Options, as section.key=value or in a recipe:\n\n" + describe_options(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ds_config", type=Path, required=True, help="DeepSpeed's JSON: batch sizes, optimizer, precision, ZeRO"
    )
    parser.add_argument(
        "--recipe", type=Path, default=DEFAULT_RECIPE, help="YAML: target, data, draft, ...; default: embedded.yaml"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options that replace the recipe's")
    return parser.parse_args()


def join_environment() -> dict[str, int]:
    """Rank and sizes as the launcher set them; a process started alone is a job of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    size = int(os.environ["WORLD_SIZE"])
    return {
        "rank": int(os.environ["RANK"]),
        "size": size,
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "local_size": int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size),
    }


def with_embedded_paths(config: Config) -> Config:
    """Replace each `embedded` by the folder or file it stands for, and a target folder by its absolute path."""
    corpus = Path(config.output_dir).absolute() / "corpus"

    def files(paths: tuple[str, ...], name: str) -> tuple[str, ...]:
        return tuple(str(corpus / name) if path == EMBEDDED else path for path in paths)

    path = Path(EMBEDDED_TARGET if config.target.path == EMBEDDED else config.target.path)
    target = replace(config.target, path=str(path.absolute()) if path.exists() else config.target.path)
    data = replace(
        config.data, train=files(config.data.train, "train.jsonl"), held_out=files(config.data.held_out, "held_out.jsonl")
    )
    return replace(config, target=target, data=data)


def check_files(config: Config) -> None:
    """Raises ConfigError if a file that the configuration names does not exist, or `output_dir` cannot be a folder."""
    named = {"data.train": config.data.train, "data.held_out": config.data.held_out, "draft.config": (config.draft.config,)}
    for key, paths in named.items():
        for path in paths:
            if path not in (EMBEDDED, None) and not Path(path).is_file():
                raise ConfigError(f"no such file; expected one below {Path.cwd()} or an absolute path", key=key, value=path)
    if config.target.path.startswith((".", "/", "~")) and not Path(config.target.path).is_dir():
        raise ConfigError(
            "no such folder; expected a Hugging Face folder or a hub id", key="target.path", value=config.target.path
        )
    if Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        raise ConfigError("is a file; name a folder", key="output_dir", value=config.output_dir)
    if Path(config.output_dir, CHECKPOINTS, "latest").exists() and not config.checkpoint.resume:
        problem = "holds checkpoints of an earlier run; set checkpoint.resume=true to continue it, or name another folder"
        raise ConfigError(problem, key="output_dir", value=config.output_dir)


def prepare_output(config: Config) -> None:
    """On rank 0: the output folder and, if asked for, the embedded corpus."""
    from engine.data.cpython_corpus import write_corpus

    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if EMBEDDED in config.data.train + config.data.held_out:
        write_corpus(output_dir / "corpus")


def stop(error: Exception, rank: int) -> NoReturn:
    """End this rank with one message. Ranks but the first wait: what ends them all is then said once, by rank 0."""
    if rank == 0:
        sys.exit(f"train.py: {error}")
    time.sleep(SECONDS_FOR_RANK_0)
    sys.exit(f"train.py: rank {rank}: {error}")


def main() -> None:
    arguments = parse_arguments()
    environment = join_environment()
    try:
        config = load_config(arguments.recipe, arguments.overrides)
        ds_config = load_ds_config(arguments.ds_config)
        accumulation_steps(ds_config, environment["size"])
        check_files(config)
    except ConfigError as error:
        if not error.source:
            on_command_line = any(override.startswith(f"{error.key}=") for override in arguments.overrides)
            error.source = COMMAND_LINE if on_command_line else arguments.recipe
        stop(error, environment["rank"])
    resolved = with_embedded_paths(config)

    from engine.parallel.mesh import World
    from engine.parallel.zero import connect, disconnect

    world = World(**environment)
    connect(world, config.parallel.timeout_s, config.parallel.cpu_threads)
    if world.is_main:
        prepare_output(config)
    world.barrier()

    from engine.trainer import Trainer

    trainer = Trainer(resolved, ds_config, world)
    try:
        report = trainer.run()
    except (ValueError, OSError, ImportError) as error:
        stop(error, world.rank)
    if world.is_main:
        report.save()
        report.show(trainer.telemetry.console)
    disconnect()


if __name__ == "__main__":
    main()
