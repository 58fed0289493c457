"""Replace assistant turns by the target's own answers: python launcher/regenerate_data.py regenerate.inputs=[chat.jsonl]
regenerate.output=out.jsonl regenerate.servers=[http://localhost:30000/v1] [--recipe FILE] [...]

Requests a new answer for each assistant turn of JSONL conversations from OpenAI-compatible servers
of the target (SGLang, vLLM). To continue an interrupted run, run the same command again: finished
conversations are kept in OUTPUT.partial. Requests carry the key in OPENAI_API_KEY. Needs no GPU on
this machine, and `pip install 'draftspeed[data]'`.
"""

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.sections import Config, ConfigError, RegenerateSection
from engine.conversations.regenerate import Regeneration, partial_of
from engine.host.telemetry import Telemetry
from launcher.command import make_parser, naming_source, read_config, stopping_at_errors


def check_inputs(section: RegenerateSection) -> None:
    """Raise ConfigError if there is no input file, or one is missing, empty or named twice."""
    key = "regenerate.inputs"
    if not section.inputs:
        raise ConfigError("expected JSONL files of conversations", key=key, value=section.inputs)
    for name in section.inputs:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"no such file; expected one below {Path.cwd()} or an absolute path", key=key, value=name)
        with path.open("rb") as lines:
            if not any(line.strip() for line in lines):
                raise ConfigError("the file is empty; expected JSONL with one conversation per line", key=key, value=name)
    if len({Path(name).resolve() for name in section.inputs}) < len(section.inputs):
        raise ConfigError("names a file twice", key=key, value=section.inputs)


def check_output(section: RegenerateSection) -> None:
    """Raise ConfigError if the output is unset, is a folder, or would replace an existing file."""
    key = "regenerate.output"
    value = section.output
    if not value:
        raise ConfigError("expected the JSONL file to write", key=key, value=value)
    output = Path(value)
    partial = partial_of(output)
    if output.is_dir() or partial.is_dir():
        raise ConfigError("is a folder; name a file in it", key=key, value=value)
    if {output.resolve(), partial.resolve()} & {Path(name).resolve() for name in section.inputs}:
        raise ConfigError("is one of regenerate.inputs; name another file", key=key, value=value)
    if output.exists() and not partial.exists():
        raise ConfigError("exists already; name another file or delete it", key=key, value=value)


def check_servers(section: RegenerateSection) -> None:
    """Raise ConfigError if there is no server, or the address of one is not a URL."""
    key = "regenerate.servers"
    value = section.servers
    if not value:
        raise ConfigError("expected addresses such as http://localhost:30000/v1", key=key, value=value)
    for server in value:
        try:
            address = urlsplit(server)
            is_url = bool(address.hostname) and address.port != 0
        except ValueError:
            is_url = False
        if not is_url:
            raise ConfigError("expected an address such as http://localhost:30000/v1", key=key, value=server)


def run(config: Config) -> None:
    telemetry = Telemetry(speaks=True)
    api_key = os.environ.get("OPENAI_API_KEY") or "none"
    with stopping_at_errors(rank=0):
        report = Regeneration(config.regenerate, config.data, telemetry, api_key).run()
    telemetry.note(report.summary())


def main() -> None:
    arguments = make_parser(__doc__, ("regenerate", "data")).parse_intermixed_args()
    with stopping_at_errors(rank=0), naming_source(arguments):
        config = read_config(arguments)
        check_inputs(config.regenerate)
        check_output(config.regenerate)
        check_servers(config.regenerate)
    run(config)


if __name__ == "__main__":
    main()
