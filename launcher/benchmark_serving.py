"""Measure what a draft gains in an SGLang or vLLM server: throughput, latency and acceptance, with and without it.

    python launcher/benchmark_serving.py --server vllm --python /opt/vllm/bin/python --target Qwen/Qwen3-8B \\
        --draft outputs/run/draft --data held_out.jsonl --batch 1 4 16 --html serving.html -- --max-model-len 4096

The command starts one server without the draft and one per shape, one after another, and ends
them. Arguments after `--` go to all of them. `--url` measures a server that runs already, and
`--plain_url` one without a draft to compare it with. Replies are greedy unless `--temperature` is
given. Requests carry the key in OPENAI_API_KEY.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.secret_values import hidden_in_text
from engine.config.sections import Config, DataSection, TargetSection
from engine.config.strict import parse_json, read_text
from engine.config.tree_shape import TreeShape
from engine.conversations.prompt_sets import PROMPT_FILES, prompt_files, prompt_path
from engine.data.templates import load_tokenizer
from engine.evaluation.acceptance import held_out_prompts
from engine.evaluation.grid import grid_shapes
from engine.evaluation.page_serving import serving_page
from engine.host.files import write_json, write_text, writing
from engine.host.telemetry import Telemetry
from engine.models.draft_folder import CONFIG
from engine.serving.draft_kinds import EAGLE3, DraftKind, draft_kind
from engine.serving.endpoint import ENDPOINTS, Endpoint, ReplySettings
from engine.serving.http_stream import ServingError, check_url
from engine.serving.served_folder import ADVICE, serving_problems
from engine.serving.server_commands import SGLANG, VLLM, ServerProgram, check_shape, check_topk
from engine.serving.server_process import HOST, ServerProcess, check_port, free_port
from engine.serving.serving_benchmark import LoadPlan, ServingBenchmark
from engine.serving.serving_results import PLAIN, latency_table, speed_table
from engine.target.configuration import load_target_config
from launcher.command import (
    TRUST,
    add_sampling_options,
    check_target,
    positive_number,
    sampling_of,
    stopping_at_errors,
    user_cache,
)

RUNNING = "draft"  # setting of a server that was running already
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Measured:
    """A server to measure.

    shape, kind: those of its draft, if this command starts it with one. url: address, if it runs already.
    """

    setting: str
    shape: TreeShape | None = None
    url: str | None = None
    kind: DraftKind = EAGLE3


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line; `server_arguments` are the words after `--`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--server", choices=(SGLANG, VLLM), required=True, help="program that serves")
    parser.add_argument("--target", required=True, help="Hugging Face folder or hub id of the target, also for its tokenizer")
    parser.add_argument("--draft", help="folder of the exported draft, for servers that this command starts")
    parser.add_argument("--python", default=sys.executable, help="Python of the server's environment; default: this one")
    parser.add_argument(
        "--port", type=positive_number, help="port of the servers that this command starts; default: a free one"
    )
    parser.add_argument("--url", help="address of a running server with the draft, such as http://localhost:30000")
    parser.add_argument("--plain_url", help="address of a running server without a draft, to compare with")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help=f"{PROMPT_FILES}; each is a set of prompts",
    )
    parser.add_argument("--num_prompts", type=positive_number, default=32, help="prompts per file; default: 32")
    parser.add_argument(
        "--batch", type=positive_number, nargs="+", default=[1, 4, 16], help="numbers of concurrent requests; default: 1 4 16"
    )
    parser.add_argument(
        "--num_steps",
        type=positive_number,
        nargs="+",
        help="depths of the drafted tokens; default: 5; block drafters always draft a whole block",
    )
    parser.add_argument(
        "--topk",
        type=positive_number,
        nargs="+",
        help="tokens drafted after each node, 1 = a chain, vLLM's only one; default: 1",
    )
    parser.add_argument(
        "--num_draft_tokens", type=positive_number, nargs="+", help="tokens of a tree that a target forward reads"
    )
    parser.add_argument("--max_new_tokens", type=positive_number, default=256, help="tokens generated per prompt; default: 256")
    parser.add_argument("--ignore_eos", action="store_true", help="generate max_new_tokens tokens, past the end of replies")
    add_sampling_options(parser)
    parser.add_argument("--repeats", type=positive_number, default=3, help="measurements per setting; default: 3")
    parser.add_argument(
        "--warmup_requests", type=_count, help="requests before the measured ones; default: one per concurrent request"
    )
    parser.add_argument(
        "--timeout_s", type=positive_number, default=600, help="seconds until a started server must be ready; default: 600"
    )
    parser.add_argument(
        "--request_timeout_s", type=positive_number, default=300, help="seconds that a request may take; default: 300"
    )
    parser.add_argument(
        "--prefix_cache", action="store_true", help="leave the prefix cache of started servers on, so repeated prompts hit it"
    )
    parser.add_argument("--logs", type=Path, help="folder for the output of started servers; default: it is not kept")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--html", type=Path, help="file to write a page with charts to")
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST)
    own = list(words)
    rest: list[str] = []
    if "--" in own:
        place = own.index("--")
        rest = own[place + 1 :]
        own = own[:place]
    arguments = parser.parse_args(own)
    arguments.server_arguments = rest
    return arguments


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 0")
    return int(text)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options contradict each other, or a file or folder is missing, and create folders for the outputs.

    Raises WriteError if that is impossible.
    """
    is_running = arguments.url is not None or arguments.plain_url is not None
    if is_running:
        _check_running(arguments)
    elif arguments.draft is None:
        raise ValueError("expected --draft FOLDER to start servers, or --url ADDRESS of a running server")
    elif not Path(arguments.draft).is_dir():
        raise ValueError(f"--draft {arguments.draft}: no such folder; expected the folder of an exported draft")
    check_target(Config(target=TargetSection(path=arguments.target)))
    for option, path in (("--json", arguments.json), ("--html", arguments.html)):
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"{option} {path}: is a folder; name a file in it")
        with writing(path.parent):  # before anything is measured
            path.parent.mkdir(parents=True, exist_ok=True)
    sampling_of(arguments)  # refuses settings that contradict each other
    names = [prompt_path(name, Path()).stem for name in arguments.data]
    if len(set(names)) < len(names):
        raise ValueError(f"--data: expected files with different names, found {' '.join(arguments.data)}; rename one")


def _check_running(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that have no effect on running servers."""
    if arguments.url is None:
        raise ValueError("--plain_url needs --url, the address of a server with the draft to compare with")
    for option, url in (("--url", arguments.url), ("--plain_url", arguments.plain_url)):
        if url is not None:
            check_url(url, option)
    set_at_start = {
        "--draft": arguments.draft,
        "--port": arguments.port,
        "--num_steps": arguments.num_steps,
        "--topk": arguments.topk,
        "--num_draft_tokens": arguments.num_draft_tokens,
        "--logs": arguments.logs,
        "-- (server arguments)": arguments.server_arguments,
    }
    for option, value in set_at_start.items():
        if value:
            raise ValueError(f"{option} has no effect on a running server; delete it, or delete --url to start servers here")


def kind_of(folder: Path) -> DraftKind:
    """Return how servers run the draft in a folder. Raises ValueError if they do not know its architecture."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"--draft {folder}: has no {CONFIG}; expected the folder of an exported draft")
    config = parse_json(read_text(path), path)
    kind = draft_kind(config)
    if kind is None:
        raise ValueError(f"--draft {folder}: servers have no draft method for architectures={config.get('architectures')}")
    return kind


def shapes_of(arguments: argparse.Namespace, kind: DraftKind) -> list[TreeShape]:
    """Return the shapes that are measured.

    Raises ValueError if the sizes contradict each other, or the server cannot draft with them.
    """
    num_steps = arguments.num_steps or [kind.block_tokens or TreeShape().num_steps]
    topk = arguments.topk or [1]
    check_topk(arguments.server, max(topk))
    shapes = grid_shapes(num_steps, topk, arguments.num_draft_tokens, "sglang")
    for shape in shapes:
        check_shape(arguments.server, shape, kind)
    return shapes


def servers_of(arguments: argparse.Namespace) -> list[Measured]:
    """Return the servers to measure, the one without a draft first.

    Raises ValueError as `shapes_of` does, and for a draft that the server would run differently from the engine.
    """
    if arguments.url is None:
        draft = Path(arguments.draft)
        kind = kind_of(draft)
        shapes = shapes_of(arguments, kind)
        target = TargetSection(path=arguments.target, trust_remote_code=arguments.trust_remote_code)
        problems = serving_problems(draft, kind, load_target_config(target), context_length(arguments.server_arguments))
        problem = problems.get(ENDPOINTS[arguments.server].name)
        if problem is not None:
            raise ValueError(f"--draft {draft}: {problem}; {ADVICE}")
        drafting = [Measured(str(shape), shape, kind=kind) for shape in shapes]
        return [Measured(PLAIN), *drafting]
    plain = [] if arguments.plain_url is None else [Measured(PLAIN, url=arguments.plain_url)]
    return [*plain, Measured(RUNNING, url=arguments.url)]


def context_length(server_arguments: Sequence[str]) -> int | None:
    """Return the tokens to which arguments of a server limit conversations, or None if they do not say a number."""
    words = [word for argument in server_arguments for word in argument.split("=", 1)]
    for option, value in zip(words, words[1:], strict=False):
        if option in ("--max-model-len", "--context-length") and value.isdecimal():
            return int(value)
    return None


def read_prompts(arguments: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Return the token ids of the prompts of each file. Raises ValueError as `prompt_files` and `held_out_prompts` do."""
    target = TargetSection(path=arguments.target, trust_remote_code=arguments.trust_remote_code)
    data = DataSection()
    tokenizer = load_tokenizer(target, data)
    sets = {}
    for path in prompt_files(arguments.data, user_cache() / "prompt_sets"):
        prompts = held_out_prompts([path], tokenizer, arguments.num_prompts, data.template_kwargs)
        sets[path.stem] = [prompt.token_ids for prompt in prompts]
    return sets


class ServingJob:
    """One run of this command: the servers are measured one after another, and results are written also if it ends early."""

    def __init__(self, arguments: argparse.Namespace, servers: Sequence[Measured], telemetry: Telemetry, api_key: str) -> None:
        self.arguments = arguments
        self.servers = servers
        self.telemetry = telemetry
        self._api_key = api_key
        self._commands: dict[str, str] = {}
        self._versions: dict[str, str | None] = {}
        self._sizes: dict[str, int] = {}

    def run(self) -> None:
        """Measure all servers and write the results. Raises ServingError, after it has written what was measured."""
        arguments = self.arguments
        prompt_sets = read_prompts(arguments)
        self._sizes = {name: len(prompts) for name, prompts in prompt_sets.items()}
        settings = ReplySettings(
            arguments.max_new_tokens, arguments.ignore_eos, arguments.temperature, arguments.top_k, arguments.top_p
        )
        plan = LoadPlan(sorted(set(arguments.batch)), settings, arguments.repeats, arguments.warmup_requests)
        total = len(self.servers) * plan.num_loads(len(prompt_sets))
        benchmark = ServingBenchmark(prompt_sets, plan)
        is_complete = False
        try:
            with self.telemetry.progress(total, "loads") as bar:
                benchmark.after_load = bar.advance
                for server in self.servers:
                    self._measure(server, benchmark)
            is_complete = True
        finally:
            if benchmark.cells:
                self._write(benchmark, is_complete)

    def _measure(self, server: Measured, benchmark: ServingBenchmark) -> None:
        """Measure one server, which is started and ended here unless it runs already."""
        if server.url is not None:
            endpoint = self._endpoint(server.url)
            endpoint.check_health()
            self._versions[server.setting] = endpoint.version()
            benchmark.measure(endpoint, server.setting)
            return
        arguments = self.arguments
        port = arguments.port or free_port()
        check_port(port)
        program = ServerProgram(
            arguments.server,
            arguments.python,
            arguments.target,
            arguments.draft,
            arguments.server_arguments,
            arguments.prefix_cache,
            server.kind,
        )
        command = program.command(server.shape, HOST, port)
        self._commands[server.setting] = hidden_in_text(shlex.join(command), self._api_key)
        self.telemetry.note(f"Starting {ENDPOINTS[arguments.server].name}, {server.setting}", style="bold")
        endpoint = self._endpoint(f"http://{HOST}:{port}")
        log = None if arguments.logs is None else arguments.logs / f"{server.setting.replace(' ', '_').replace(',', '')}.log"
        with ServerProcess(command, endpoint, arguments.timeout_s, log) as process:
            self._versions[server.setting] = endpoint.version()
            try:
                benchmark.measure(endpoint, server.setting, server.shape)
            except ServingError as error:
                raise process.explained(error) from error

    def _endpoint(self, url: str) -> Endpoint:
        return ENDPOINTS[self.arguments.server](url, self.arguments.request_timeout_s, self._api_key)

    def _write(self, benchmark: ServingBenchmark, is_complete: bool) -> None:
        """Print the table, and write the JSON file and the page."""
        arguments = self.arguments
        cells = benchmark.cells
        name = ENDPOINTS[arguments.server].name
        how = f"sampled replies, temperature {arguments.temperature:g}," if arguments.temperature else "greedy replies"
        title = f"{name}: {how} of up to {arguments.max_new_tokens} tokens"
        self.telemetry.console.print(speed_table(cells, title))
        self.telemetry.console.print(latency_table(cells))
        if PLAIN not in self._versions:
            self.telemetry.note("There is no server without a draft to compare with; name one with --plain_url.")
        elif any(cell.mismatches for cell in cells):
            advice = "serve in float32 to find out"
            self.telemetry.note(f"Tokens may differ where two of them nearly tie, or batches differ in size; {advice}.")
        if arguments.json is not None:
            write_json(arguments.json, self._facts() | {"complete": is_complete, "cells": [cell.to_dict() for cell in cells]})
        if arguments.html is not None:
            sets = ", ".join(f"{count} prompts of {prompts}" for prompts, count in self._sizes.items())
            versions = ", ".join(dict.fromkeys(version for version in self._versions.values() if version))
            subtitle = (
                f"{name} {versions}, target {arguments.target}; {sets}; {arguments.repeats} repeats. Bands: range of repeats."
            )
            write_text(arguments.html, serving_page(title, subtitle, cells, is_complete))
            self.telemetry.note(f"Page with charts: {arguments.html}")

    def _facts(self) -> dict[str, Any]:
        """Return what was measured and how, for JSON."""
        arguments = self.arguments
        return {
            "server": arguments.server,
            "versions": self._versions,
            "commands": self._commands,
            "target": arguments.target,
            "draft": arguments.draft,
            "num_prompts": self._sizes,
            "max_new_tokens": arguments.max_new_tokens,
            "ignore_eos": arguments.ignore_eos,
            "sampling": {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")},
            "prefix_cache": arguments.prefix_cache if arguments.url is None else None,
        }


@contextmanager
def ending_at_signals() -> Iterator[None]:
    """Context manager in which SIGTERM and SIGHUP raise SystemExit, so that servers that were started are ended."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(f"{Path(sys.argv[0]).name}: ended by {signal.Signals(number).name}")

    earlier = {number: signal.signal(number, end) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    telemetry = Telemetry(speaks=True)
    with ending_at_signals(), stopping_at_errors(rank=0):
        check_arguments(arguments)
        servers = servers_of(arguments)
        job = ServingJob(arguments, servers, telemetry, os.environ.get("OPENAI_API_KEY") or "")
        try:
            job.run()
        except KeyboardInterrupt:
            sys.exit(f"{Path(sys.argv[0]).name}: stopped by hand")


if __name__ == "__main__":
    main()
