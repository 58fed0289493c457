"""Published sets of prompts on which drafts are compared."""

import json
from pathlib import Path

from engine.conversations.published_sets import open_source
from engine.host.files import write_text

# Name, and place on the Hugging Face hub as owner/name:config:split.
PROMPT_SETS = {
    "mt_bench": "HuggingFaceH4/mt_bench_prompts::train",
    "gsm8k": "openai/gsm8k:main:test",
    "humaneval": "openai/openai_humaneval::test",
    "math500": "HuggingFaceH4/MATH-500::test",
}


def fetch_prompt_set(name: str, folder: Path) -> Path:
    """Return the JSONL file of a published set, which is downloaded into `folder` if it is not there.

    Raises ValueError if the hub cannot be reached or the package datasets is missing, and WriteError.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        lines = [json.dumps(row, default=str) for _, row in open_source(PROMPT_SETS[name])]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{line}\n" for line in lines))
    return path
