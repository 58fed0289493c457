"""Published sets of prompts on which drafts are compared."""

import json
from collections.abc import Sequence
from pathlib import Path

from engine.conversations.published_sets import FILE_TYPES, HUB_NAME, open_source
from engine.host.files import write_text

# Name, and place on the Hugging Face hub as owner/name:config:split.
PROMPT_SETS = {
    "mt_bench": "HuggingFaceH4/mt_bench_prompts::train",
    "gsm8k": "openai/gsm8k:main:test",
    "humaneval": "openai/openai_humaneval::test",
    "math500": "HuggingFaceH4/MATH-500::test",
}
# What `prompt_files` accepts, for the help of commands.
PROMPT_FILES = (
    "JSONL files with conversations or with the questions of a benchmark, or sets that are downloaded: "
    f"{', '.join(PROMPT_SETS)}, or owner/name:config:split of the Hugging Face hub"
)


def prompt_files(names: Sequence[str], folder: Path) -> list[Path]:
    """Return the JSONL files of prompts that a command line names.

    names: files, names of `PROMPT_SETS`, or sets of the hub as owner/name:config:split, with at least one colon.
    folder: into which sets are downloaded. Raises ValueError and WriteError as `fetch_prompt_set` does.
    """
    return [fetch_prompt_set(name, folder) if _is_set(name) else Path(name) for name in names]


def prompt_path(name: str, folder: Path) -> Path:
    """Return the file that `prompt_files` returns for a name, which need not exist yet."""
    if not _is_set(name):
        return Path(name)
    file_name = name.replace("/", "+").replace(":", "+")  # names of the hub have no +
    return folder / f"{file_name}.jsonl"


def _is_set(name: str) -> bool:
    if name in PROMPT_SETS:
        return True
    is_path = Path(name).exists() or ":" not in name or name.endswith(FILE_TYPES)
    return not is_path and HUB_NAME.fullmatch(name) is not None


def fetch_prompt_set(name: str, folder: Path) -> Path:
    """Return the JSONL file of a published set, which is downloaded into `folder` if it is not there.

    name: of `PROMPT_SETS`, or owner/name:config:split on the hub; the split is `train` if it is not given.
    Raises ValueError if the hub cannot be reached or the package datasets is missing, and WriteError.
    """
    path = prompt_path(name, folder)
    if not path.is_file():
        lines = [json.dumps(row, default=str) for _, row in open_source(PROMPT_SETS.get(name, name))]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{line}\n" for line in lines))
    return path
