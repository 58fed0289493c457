"""The `draftspeed` command of an installed package: `draftspeed train ...` runs `launcher/train.py ...`, and so on.

On several GPUs: `torchrun --nproc_per_node 8 --no_python draftspeed train ...`.
"""

import ast
import runpy
import sys
from pathlib import Path

from engine import __version__
from engine.config.strict import did_you_mean

FOLDER = Path(__file__).parent
COMMANDS = {
    "check": "check_setup.py",
    "prepare": "prepare_data.py",
    "regenerate": "regenerate_data.py",
    "inspect": "inspect_data.py",
    "plan": "plan_job.py",
    "capture": "capture_hidden_states.py",
    "inspect_store": "inspect_store.py",
    "train": "train.py",
    "measure": "measure_acceptance.py",
    "benchmark_serving": "benchmark_serving.py",
    "export": "export_draft.py",
    "report": "write_report.py",
    "replay": "replay_batch.py",
}


def main() -> None:
    """Run the script of the command given by the first argument."""
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(f"draftspeed {__version__}")
        return
    if name not in COMMANDS:
        sys.exit(f"draftspeed: {name}: expected {' | '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}")
    script = FOLDER / COMMANDS[name]
    sys.argv = [str(script), *arguments[1:]]
    runpy.run_path(str(script), run_name="__main__")


def usage() -> str:
    """Return the list of commands, each with the first phrase of its script's docstring."""
    lines = ["usage: draftspeed COMMAND [options]", "", "`draftspeed COMMAND --help` lists the options of a command.", ""]
    for name, file in COMMANDS.items():
        description = ast.get_docstring(ast.parse((FOLDER / file).read_text(encoding="utf-8"))) or ""
        first = description.partition("\n")[0].partition(": ")[0]
        lines.append(f"  {name:19}{first}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
