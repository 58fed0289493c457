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

from engine.config.ds_config import accumulation_steps, compute_dtype, load_ds_config
from engine.config.sections import DRAFT, Config, ConfigError
from engine.host.weight_index import INDEX, PICKLED, SINGLE
from launcher.command import (
    check_inputs,
    check_output,
    end_process,
    join_environment,
    make_parser,
    naming_source,
    order_launches,
    read_config,
    run_plugins,
    shipped_ds_config,
    stopping_at_errors,
    with_paths,
    with_store,
    write_embedded_corpus,
)

# Names of what holds the weights of a draft, or their index; EAGLE's authors publish the last one.
DRAFT_WEIGHTS = (SINGLE, INDEX, PICKLED)


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
    for key, folder in {"target.store": store, "evaluation.store": config.evaluation.store}.items():
        if folder is not None and not Path(folder).is_dir():
            problem = "no such folder; write one with launcher/capture_hidden_states.py"
            raise ConfigError(problem, key=key, value=folder)
    if config.draft.init_from is not None and config.checkpoint.resume is False:
        check_initial_draft(Path(config.draft.init_from))
    check_output(config)


def check_initial_draft(folder: Path) -> None:
    """Raise ConfigError if the folder of `draft.init_from` holds no weights under a name that is read."""
    problem = None
    if not folder.is_dir():
        problem = "no such folder"
    elif not any((folder / name).is_file() for name in DRAFT_WEIGHTS):
        problem = f"holds none of {', '.join(DRAFT_WEIGHTS)}"
    if problem is not None:
        advice = "expected the folder of an exported draft, such as `draft` in the output_dir of a run"
        raise ConfigError(f"{problem}; {advice}", key="draft.init_from", value=str(folder))


def conversations_of(config: Config) -> tuple[str, ...]:
    """Return the conversation files that a run reads."""
    if config.target.store is not None:
        return ()
    evaluation = config.evaluation
    reads_held_out = evaluation.num_prompts or (evaluation.every_steps and evaluation.num_documents)
    return config.data.train + config.data.held_out if reads_held_out else config.data.train


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


def flags_of(config: Config) -> list[str]:
    """Return the flags with which later commands may run code of others, as this run did."""
    flags = ["--plugins", *config.target.plugins] if config.target.plugins else []
    return [*flags, "--trust_remote_code"] if config.target.trust_remote_code else flags


def main() -> None:
    arguments = parse_arguments()
    environment = join_environment()
    with stopping_at_errors(environment["rank"]), naming_source(arguments):
        config = read_config(arguments)
        ds_config = load_ds_config(arguments.ds_config)
        sides = sides_of(config, environment["size"])
        accumulation_steps(ds_config, environment["size"] if sides is None else sides[0])
        check_files(config)
        if config.overlap.priority == "draft" and compute_dtype(ds_config) == "float16":
            problem = "is not possible in fp16, whose check for overflow DeepSpeed runs on the default stream; use bf16"
            raise ConfigError(problem, key="overlap.priority", value="draft")
    output_dir = Path(config.output_dir).absolute()
    corpus = output_dir / "corpus"
    resolved = with_paths(config, corpus)
    with stopping_at_errors(environment["rank"]):
        resolved = with_store(resolved)
    order_launches(config)

    from engine.overlap.bridge import Sides
    from engine.overlap.placement import check_colocated
    from engine.parallel.mesh import World
    from launcher.job_ranks import join_job

    with stopping_at_errors(environment["rank"]), naming_source(arguments):
        check_colocated(config.placement, config.replica_size, World(**environment).device)
    with stopping_at_errors(environment["rank"]):
        job = join_job(environment, config.parallel, output_dir, None if sides is None else Sides(*sides, config.replica_size))

    from engine.models.draft_folder import read_draft_config
    from engine.parallel.nodes import is_shared
    from engine.runtime.target_server import TargetServer
    from engine.serving.draft_kinds import draft_kind
    from engine.trainer import Trainer

    with job.ending_together(), job.holding(output_dir), naming_source(arguments):
        run_plugins(config.target.plugins)
        if job.bridge is not None and job.is_target:
            job.wait_for_other_side()
            TargetServer(resolved, ds_config, job.world, job.bridge, job.watch.progress).run()
        else:
            world = replace(job.world, shares_output=is_shared(output_dir, job.world))
            trainer = Trainer(resolved, ds_config, world, job.bridge, job.watch.progress)
            if world.writes_output:
                write_embedded_corpus(conversations_of(config), corpus)
            world.barrier()
            job.wait_for_other_side()
            report = trainer.run()
            if world.is_main:
                report.save()
                trainer.write_page()
                trainer.write_card()
                kind = draft_kind(read_draft_config(output_dir / DRAFT))
                report.show(trainer.telemetry.console, flags_of(config), kind)
    job.leave()


if __name__ == "__main__":
    main()
    end_process()
