"""Functions shared by the launcher's commands: options, environment, paths and error messages."""

import argparse
import atexit
import math
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, TypeVar

from engine.config.data_section import NAMED_TEMPLATES
from engine.config.recipe import COMMAND_LINE, describe_options, load_config
from engine.config.secret_values import hidden_in_text
from engine.config.sections import AUTO, CHECKPOINTS, COLOCATED, EMBEDDED, RECIPE, Config, ConfigError
from engine.host.processes import allow_many_files, collect_garbage_rarely

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from engine.evaluation.sampling import Sampling
    from engine.models.draft_method import DraftMethod

Section = TypeVar("Section", bound="DataclassInstance")
ROOT = Path(__file__).resolve().parents[1]
DEFAULT_RECIPE = ROOT / "launcher" / "recipes" / "embedded.yaml"
EMBEDDED_TARGET = ROOT / "launcher" / "embedded" / "target"
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# Environment variables that hold secrets, which must not appear in messages.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "COMET_API_KEY", "WANDB_API_KEY")
TRUST = "run Python code that the target's checkpoint ships; what the run's config.yaml says about it is not followed"
SECONDS_FOR_RANK_0 = 3  # launchers end a job within about a second of its first failure

collect_garbage_rarely()  # before torch and transformers are imported


def shipped(folder: str, suffix: str) -> Callable[[str], Path]:
    """Return a converter for command-line paths that also accepts the name of a shipped file.

    Such a name may omit the suffix: `zero3` or `zero3.json`. A path that exists is returned
    unchanged.
    folder: folder of the shipped files, relative to the root of the installation.
    suffix: suffix of the shipped files.
    """

    def read_path(given: str) -> Path:
        path = Path(given)
        name = path.name if path.suffix == suffix else f"{path.name}{suffix}"
        own = ROOT / folder / name
        is_name = path.parent in (Path("."), Path(folder))
        return own if not path.is_file() and is_name and own.is_file() else path

    return read_path


shipped_ds_config = shipped("ds_configs", ".json")
shipped_recipe = shipped("launcher/recipes", ".yaml")


def make_parser(description: str, sections: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with the options that all commands with a recipe have.

    sections: sections whose options --help describes; () = all.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Options, as section.key=value or in a recipe:\n\n" + describe_options(sections),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        type=shipped_recipe,
        default=DEFAULT_RECIPE,
        help="YAML file with target, data, draft, ..., or the name of a shipped recipe, such as qwen3-8b; default: embedded",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options that replace the recipe's")
    return parser


def positive_number(text: str) -> int:
    """Return the number of a command-line option. Raises ArgumentTypeError unless it is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def non_negative_number(text: str) -> float:
    """Return the number of a command-line option. Raises ArgumentTypeError unless it is finite and at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 0")
    return value


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `sampling_of` reads."""
    parser.add_argument(
        "--temperature", type=non_negative_number, default=0.0, help="of sampled replies; default: 0, greedy decoding"
    )
    parser.add_argument("--top_k", type=positive_number, help="most likely tokens that sampling chooses among; default: all")
    parser.add_argument(
        "--top_p",
        type=non_negative_number,
        default=1.0,
        help="probability of the tokens that sampling chooses among; default: 1",
    )


def sampling_of(arguments: argparse.Namespace) -> "Sampling":
    """Return how the target chooses tokens. Raises ValueError for settings that contradict each other."""
    from engine.evaluation.sampling import Sampling  # it imports torch

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    is_restricted = sampling.top_k is not None or sampling.top_p < 1
    if sampling.is_greedy and is_restricted:
        raise ValueError("--top_k and --top_p restrict sampled replies; add --temperature, such as --temperature 0.7")
    return sampling


def set_allocator() -> None:
    """Let PyTorch's CUDA allocator use expandable segments, unless the user has configured it.

    Call it before torch is imported. Row counts differ at every step, and segments of fixed size
    fragment. Torch reads the first of `ALLOCATOR_VARIABLES` that is set.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def check_run(run: Path) -> None:
    """Raise ValueError if `run` is not the output folder of a training run."""
    from engine.models.draft_folder import VOCAB  # it imports torch

    if not run.is_dir():
        raise ValueError(f"{run} is no folder; expected the output_dir of a training run")
    for name in (RECIPE, VOCAB):
        if not (run / name).is_file():
            raise ValueError(f"{run} is not the output_dir of a training run: it has no {name}; train.py writes it there")


def read_config(arguments: argparse.Namespace) -> Config:
    """Read the recipe and the overrides of a command line; `~` at the beginning of a path is the home folder.

    Raises ConfigError as `load_config` does.
    """
    config = load_config(arguments.recipe, arguments.overrides)
    target = _with_home(config.target, ("path", "store", "plugins"))
    data = _with_home(config.data, ("train", "held_out", "template", "cache_dir"))
    draft = _with_home(config.draft, ("config", "vocab_map", "init_from"))
    evaluation = _with_home(config.evaluation, ("store",))
    return replace(_with_home(config, ("output_dir",)), target=target, data=data, draft=draft, evaluation=evaluation)


def _with_home(section: Section, names: Sequence[str]) -> Section:
    """Return a section whose options of these names, paths or lists of paths, have `~` replaced."""
    changed: dict[str, Any] = {}
    for name in names:
        value = getattr(section, name)
        if isinstance(value, str) and value.startswith("~"):
            changed[name] = os.path.expanduser(value)
        elif isinstance(value, tuple):
            changed[name] = tuple(os.path.expanduser(path) for path in value)
    return replace(section, **changed)


def order_launches(config: Config) -> None:
    """Let NCCL run operations of several communicators in the order in which the host issues them.

    Needed if ranks share the target while the draft trains. Call it before a process group exists.
    """
    if config.replica_size > 1 and config.placement in (AUTO, COLOCATED):
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")


class Environment(TypedDict):
    """Rank of this process and sizes of the job, as in `engine.parallel.mesh.World`."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def join_environment() -> Environment:
    """Prepare this process's environment for torch; return rank and sizes set by the launcher.

    A process that was started without a launcher is a job with one rank.
    """
    set_allocator()
    allow_many_files()
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


@contextmanager
def naming_source(arguments: argparse.Namespace) -> Iterator[None]:
    """Context manager in which a ConfigError names the source of its value: the recipe or the command line."""
    try:
        yield
    except ConfigError as error:
        if not error.source:
            on_command_line = any(override.startswith(f"{error.key}=") for override in arguments.overrides)
            error.source = COMMAND_LINE if on_command_line else arguments.recipe
        raise


@contextmanager
def stopping_at_errors(rank: int) -> Iterator[None]:
    """Context manager that ends this rank with one message if a user's error is raised inside.

    Use it before the ranks have joined; afterwards `launcher.job_ranks` ends them together.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        stop(error, rank)


def with_paths(config: Config, corpus: Path) -> Config:
    """Replace each `embedded` by the folder or file it stands for, and folders by absolute paths.

    corpus: folder of the embedded corpus.
    """

    def files(paths: tuple[str, ...], name: str) -> tuple[str, ...]:
        return tuple(str(corpus / name) if path == EMBEDDED else path for path in paths)

    folder = Path(EMBEDDED_TARGET if config.target.path == EMBEDDED else config.target.path)
    path = str(folder.absolute()) if folder.exists() else config.target.path
    store = config.target.store and str(Path(config.target.store).absolute())
    train = files(config.data.train, "train.jsonl")
    held_out = files(config.data.held_out, "held_out.jsonl")
    cache_dir = Path(config.data.cache_dir or user_cache()).expanduser().absolute()
    template = config.data.template
    if template is not None and template not in NAMED_TEMPLATES:
        template = str(Path(template).absolute())
    data = replace(config.data, template=template, cache_dir=str(cache_dir), train=train, held_out=held_out)
    held_out_store = config.evaluation.store and str(Path(config.evaluation.store).absolute())
    evaluation = replace(config.evaluation, store=held_out_store)
    return replace(config, target=replace(config.target, path=path, store=store), data=data, evaluation=evaluation)


def run_plugins(paths: Sequence[str], option: str = "target.plugins") -> None:
    """Run a user's plugins, Python files that may register extensions (docs/extending.md).

    option: the option that names them, for messages.
    Raises ValueError that names the file if it does not exist or raises an exception.
    """
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{option}: {path}: no such file")
        try:
            runpy.run_path(path)
        except Exception as error:
            raise ValueError(f"{option}: {path}: {type(error).__name__}: {error}") from error


def method_of_run(run: Config, plugins: Sequence[str]) -> "DraftMethod":
    """Return the draft method of an earlier run.

    plugins: the plugins of the command line. Those that the run's config.yaml names are not run,
        because the folder may be someone else's.
    Raises ValueError if no method has this name.
    """
    from engine.models.method_registry import make_method  # it imports torch

    try:
        return make_method(run)
    except ConfigError as error:
        error.source = "config.yaml of the run"
        if error.key != "draft.method" or plugins or not run.target.plugins:
            raise
        raise ValueError(f"{error}. {hint_of_plugins(run)}") from error


def hint_of_plugins(run: Config) -> str:
    """Return the advice to name the plugins of an earlier run, which are not run by themselves."""
    return f"The run had plugins; name them to run them again: --plugins {' '.join(run.target.plugins)}"


def user_cache() -> Path:
    """Return the default folder for tokenised conversations."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "draftspeed"


def with_store(config: Config) -> Config:
    """Return the configuration with the target taken from its store.

    The store has the target's config, its tokenizer and the captured auxiliary layers. Auxiliary
    layers that the configuration sets are kept. Without `target.store` the configuration is
    returned unchanged. Raises ValueError if `target.store` is not a store, or if its config or
    tokenizer is missing or was altered.
    """
    if config.target.store is None:
        return config
    from engine.hidden_states.store_format import TARGET_FOLDER, Manifest  # it imports torch
    from engine.hidden_states.target_files import check_small_files

    store = Path(config.target.store)
    manifest = Manifest.read(store)
    check_small_files(store, manifest.target_files)
    layers = config.target.aux_layers or manifest.contents.aux_layers
    target = replace(config.target, path=str(store / TARGET_FOLDER), revision=None, aux_layers=layers)
    try:
        return replace(config, target=target)
    except ConfigError as error:
        problem = f"{store} was captured with layers {list(layers)}, which draft.method={config.draft.method} cannot read"
        raise ValueError(f"{problem}: {error.problem}") from error


def check_inputs(config: Config, reads_prompts: bool = False) -> None:
    """Raise ConfigError if a file or folder that the configuration reads does not exist.

    reads_prompts: whether the command reads held-out prompts.
    """
    named = {"data.train": config.data.train, "draft.config": (config.draft.config,), "target.plugins": config.target.plugins}
    if reads_prompts and config.evaluation.num_prompts:
        named["data.held_out"] = config.data.held_out
    for key, paths in named.items():
        for path in paths:
            if path not in (EMBEDDED, None) and not Path(path).is_file():
                raise ConfigError(f"no such file; expected one below {Path.cwd()} or an absolute path", key=key, value=path)
    check_target(config)


def check_target(config: Config) -> None:
    """Raise ConfigError if `target.path` is a local path, not a hub id, and no folder is there."""
    if config.target.path.startswith((".", "/", "~")) and not Path(config.target.path).is_dir():
        raise ConfigError(
            "no such folder; expected a Hugging Face folder or a hub id", key="target.path", value=config.target.path
        )


def check_output(config: Config) -> None:
    """Raise ConfigError if `output_dir` is a file or holds checkpoints that would be lost."""
    if Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        raise ConfigError("is a file; name a folder", key="output_dir", value=config.output_dir)
    if Path(config.output_dir, CHECKPOINTS, "latest").exists() and config.checkpoint.resume is False:
        problem = "holds checkpoints of an earlier run; set checkpoint.resume=true to continue it, or name another folder"
        raise ConfigError(problem, key="output_dir", value=config.output_dir)


def write_embedded_corpus(paths: Sequence[str], corpus: Path) -> None:
    """Create the parent folder of `corpus`; write the embedded corpus if it is one of the files that a command reads.

    paths: these files, as the recipe names them. Call it on rank 0 only.
    """
    from engine.data.cpython_corpus import write_corpus

    corpus.parent.mkdir(parents=True, exist_ok=True)
    if EMBEDDED in paths:
        write_corpus(corpus)


def end_process(code: int = 0) -> NoReturn:
    """End this process without the destructors of C++ libraries.

    Exit functions run and output is flushed; work that is pending in thread pools is dropped. At
    the normal end of the interpreter, a thread of a process group that still holds a tensor can
    abort the process ("terminate called without an active exception"), although its work is done.
    """
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError):  # the reader of the output may have gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def stop(error: Exception, rank: int) -> NoReturn:
    """End this rank with one message.

    Ranks other than 0 wait first, so that rank 0 alone reports an error that ends all ranks.
    """
    command = Path(sys.argv[0]).name
    message = error_message(error)
    if rank == 0:
        sys.exit(f"{command}: {message}")
    time.sleep(SECONDS_FOR_RANK_0)
    sys.exit(f"{command}: rank {rank}: {message}")


def error_message(error: Exception) -> str:
    """Return the message of an error, without secrets."""
    return hidden_in_text(str(error), *(os.environ.get(name) for name in SECRETS))
