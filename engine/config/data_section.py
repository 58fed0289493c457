"""What a recipe can say of conversations: where they come from, how they are rendered, cut and packed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config.strict import ConfigError, nearest, option

EMBEDDED = "embedded"
RESERVED = {
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_assistant_tokens_mask",
    "tools",
}
NAMED_TEMPLATES = dict(sorted((path.stem, path) for path in Path(__file__).parents[1].glob("data/chat_templates/*.jinja")))


@dataclass(frozen=True)
class DataSection:
    """Conversations, and how they become packed batches."""

    train: tuple[str, ...] = option((EMBEDDED,), "JSONL conversation files to train on; 'embedded' is CPython's documentation")
    held_out: tuple[str, ...] = option((EMBEDDED,), "JSONL conversation files for evaluation; never trained on")
    max_tokens: int = option(4096, "length documents are packed to", unit="tokens", at_least=8)
    template: str | None = option(
        None, f"chat template: one of {', '.join(NAMED_TEMPLATES)}, or a .jinja file; null = the tokenizer's own"
    )
    template_kwargs: dict[str, Any] | None = option(None, "extra arguments of the chat template, e.g. {enable_thinking: false}")
    train_on: Literal["all", "last"] = option("all", "the assistant's turns that carry loss: all, or a conversation's last")
    turns: Literal["auto", "whole", "each"] = option(
        "auto",
        "'whole' = one document a conversation, refused where the chat template rewrites earlier turns; 'each' = one per "
        "assistant turn, as served; 'auto' = whole where it can be verified, else each",
    )
    lost_thinking: Literal["count", "refuse"] = option(
        "count",
        "thinking of a reply that the chat template does not write, or for which the prompt leaves no place: 'count' such "
        "conversations and train on the rest of the reply, or 'refuse' them",
    )
    long_documents: Literal["cut", "split"] = option(
        "cut", "a document above max_tokens: 'cut' it at its last whole turn, or 'split' it into several at turns"
    )
    balance_steps: int = option(
        8,
        "steps whose packs are sorted so that those of a step cost alike and ranks wait less for each other; 0 = as drawn",
        unit="steps",
        at_least=0,
    )
    cache_dir: str | None = option(
        None, "folder of tokenised conversations, shared by ranks and runs; null = draftspeed in the user's cache folder"
    )
    workers: int = option(
        0, "processes of a machine that tokenise; 0 = one a core, and one for what they would not speed up", at_least=0
    )
    max_bad_share: float = option(0.05, "share of unusable samples above which the run stops", at_least=0.0, at_most=1.0)

    def __post_init__(self):
        if not self.train:
            raise ConfigError("nothing to train on; name at least one file", key="data.train", value=self.train)
        if self.template is not None and self.template not in NAMED_TEMPLATES and not Path(self.template).is_file():
            guess = nearest(self.template, NAMED_TEMPLATES)
            problem = f"no such file, and no name among {', '.join(NAMED_TEMPLATES)}" + (
                f"; did you mean '{guess}'?" if guess else ""
            )
            raise ConfigError(problem, key="data.template", value=self.template)
        for name in RESERVED & (self.template_kwargs or {}).keys():
            problem = "is for whoever renders, not for the template; leave it out"
            raise ConfigError(problem, key="data.template_kwargs", value=name)
        trained_on = {os.path.realpath(path) for path in self.train if path != EMBEDDED}
        for path in self.held_out:
            if os.path.realpath(path) in trained_on:
                problem = f"'{path}' is also in data.train; hold out a file that is never trained on"
                raise ConfigError(problem, key="data.held_out", value=self.held_out)


@dataclass(frozen=True)
class PrepareSection:
    """What prepare_data.py makes a training and a held-out file of."""

    sources: tuple[str, ...] = option(
        (), "named sets (--sources lists them), hub ids (owner/name, owner/name:config:split), JSONL, JSON or Parquet files"
    )
    weights: tuple[float, ...] | None = option(
        None, "conversations of each source relative to the others', as many as the scarcest allows; null = all there are"
    )
    max_samples: int | None = option(None, "conversations taken in all; null = as many as there are", at_least=1)
    held_out_share: float = option(
        0.02, "share of the conversations, drawn by their first question, that is held out", at_least=0.0, at_most=0.5
    )
    output_dir: str = option("outputs/data", "folder for train.jsonl, held_out.jsonl and report.json")

    def __post_init__(self):
        weights = self.weights
        if weights is not None and len(weights) != len(self.sources):
            problem = f"has {len(weights)} weights for {len(self.sources)} prepare.sources; give one weight a source"
            raise ConfigError(problem, key="prepare.weights", value=weights)
        if weights is not None and min(weights, default=1.0) <= 0:
            raise ConfigError("expected weights above 0; leave a source out instead", key="prepare.weights", value=weights)
        if len(set(self.sources)) < len(self.sources):
            raise ConfigError("names a source twice; give it a larger weight", key="prepare.sources", value=self.sources)


@dataclass(frozen=True)
class RegenerateSection:
    """How regenerate_data.py lets the target itself answer."""

    inputs: tuple[str, ...] = option((), "JSONL conversation files whose assistant turns are replaced")
    output: str | None = option(None, "JSONL file for the new conversations, in the order of the inputs")
    servers: tuple[str, ...] = option(
        (), "OpenAI-compatible servers of the target (SGLang, vLLM), used alike, e.g. http://localhost:30000/v1"
    )
    model: str | None = option(None, "name of the model on the servers; null = the one that they serve")
    concurrency: int = option(64, "requests to a server at a time", unit="requests", at_least=1)
    attempts: int = option(6, "times a request is sent before its conversation is given up", unit="requests", at_least=1)
    timeout_s: float = option(600.0, "silence after which a request is sent again", unit="s", at_least=0.1)
    max_new_tokens: int = option(4096, "tokens of a reply; a conversation whose reply is longer is left out", at_least=1)
    temperature: float = option(0.0, "of the replies; 0 = greedy, as drafts are most often used", at_least=0.0)

    def __post_init__(self):
        for server in self.servers:
            if not server.startswith(("http://", "https://")):
                problem = "expected addresses such as http://localhost:30000/v1"
                raise ConfigError(problem, key="regenerate.servers", value=self.servers)
