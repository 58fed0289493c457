"""Capture a target's hidden states: deepspeed launcher/capture_hidden_states.py [--recipe FILE] target.store=FOLDER [...]

Runs the frozen target on the conversations of data.train and writes the hidden states that a draft
learns from to a store. train.py with the same target.store then needs no target. Accepts the
recipes of train.py, and runs under `deepspeed`, `torchrun` and plain `python`, on any number of
ranks. To continue an interrupted capture, run the same command again.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.config.sections import Config, ConfigError
from launcher.command import (
    check_inputs,
    end_process,
    join_environment,
    make_parser,
    naming_source,
    read_config,
    run_plugins,
    stopping_at_errors,
    with_paths,
    write_embedded_corpus,
)


def check_files(config: Config) -> Path:
    """Return the folder of the store.

    Raises ConfigError if target.store is not set or is not a folder, or if an input file does not
    exist.
    """
    store = config.target.store
    if store is None or (Path(store).exists() and not Path(store).is_dir()):
        raise ConfigError("expected the folder that the store is to be written to", key="target.store", value=store)
    if config.target.source is not None:
        problem = "a capture always runs the target itself; leave this option out"
        raise ConfigError(problem, key="target.source", value=config.target.source)
    check_inputs(config)
    return Path(store)


def main() -> None:
    arguments = make_parser(__doc__).parse_intermixed_args()
    environment = join_environment()
    with stopping_at_errors(environment["rank"]), naming_source(arguments):
        config = read_config(arguments)
        store = check_files(config).absolute()
    corpus = store / "corpus"
    resolved = with_paths(config, corpus)

    from engine.parallel.nodes import is_shared
    from launcher.job_ranks import join_job

    with stopping_at_errors(environment["rank"]):
        job = join_job(environment, config.parallel, store)
    world = job.world

    from engine.hidden_states.capture import Capture

    with job.ending_together(), job.holding(store), naming_source(arguments):
        if not is_shared(store, world):
            problem = f"target.store = {config.target.store} is not one folder on all {world.num_nodes} nodes"
            raise ValueError(f"{problem}; name one on a file system that they share")
        run_plugins(config.target.plugins)
        capture = Capture(resolved, world)
        if world.is_main:
            write_embedded_corpus(config.data.train, corpus)
        world.barrier()
        report = capture.run()
        if world.is_main:
            capture.telemetry.note(report.summary())
    job.leave()


if __name__ == "__main__":
    main()
    end_process()
