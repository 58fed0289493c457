"""Recipe sections on conversations: their sources, and how they are rendered, cut and packed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config.strict import ConfigError, did_you_mean, option

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
    """Conversations, and how they are rendered and packed into batches."""

    train: tuple[str, ...] = option(
        (EMBEDDED,), "JSONL conversation files to train on; 'embedded' = conversations from CPython's documentation"
    )
    held_out: tuple[str, ...] = option((EMBEDDED,), "JSONL conversation files for evaluation; never trained on")
    max_tokens: int = option(
        4096, "maximum length of a pack of documents; see long_documents for longer documents", unit="tokens", at_least=8
    )
    template: str | None = option(
        None, f"chat template: one of {', '.join(NAMED_TEMPLATES)}, or a .jinja file; null = the tokenizer's own"
    )
    template_kwargs: dict[str, Any] | None = option(
        None, "extra arguments for the chat template, e.g. {enable_thinking: false}"
    )
    train_on: Literal["all", "last"] = option(
        "all", "assistant turns that carry loss: 'all' of them, or only the 'last' one of each conversation"
    )
    turns: Literal["auto", "whole", "each"] = option(
        "auto",
        "'whole' = one document per conversation, refused if the chat template rewrites earlier turns; 'each' = one document "
        "per assistant turn, as when serving; 'auto' = 'whole' if its mask can be verified, otherwise 'each'",
    )
    lost_thinking: Literal["count", "refuse"] = option(
        "count",
        "conversations whose rendered text lacks the thinking of a reply, because the chat template does not write it or the "
        "prompt leaves no place for it: 'count' = count them and train on the rest of the reply; 'refuse' = do not use them",
    )
    long_documents: Literal["cut", "split"] = option(
        "cut",
        "documents longer than max_tokens: 'cut' = end at the last whole turn that fits; 'split' = divide into several "
        "documents at turns",
    )
    balance_steps: int = option(
        8,
        "number of steps whose packs are sorted together by cost, so that the packs of a step cost about the same and ranks "
        "wait less for each other; 0 = no sorting",
        unit="steps",
        at_least=0,
    )
    cache_dir: str | None = option(
        None, "folder for tokenised conversations, shared by ranks and runs; null = draftspeed in the user's cache folder"
    )
    workers: int = option(
        0, "tokenising processes per machine; 0 = one per core, or a single one for small data sets", at_least=0
    )
    max_bad_share: float = option(0.05, "share of unusable conversations above which the run stops", at_least=0.0, at_most=1.0)

    def __post_init__(self):
        if not self.train:
            raise ConfigError("nothing to train on; name at least one file", key="data.train", value=self.train)
        if self.template is not None and self.template not in NAMED_TEMPLATES and not Path(self.template).is_file():
            hint = did_you_mean(self.template, NAMED_TEMPLATES)
            problem = f"no such file, and not one of {', '.join(NAMED_TEMPLATES)}{hint}"
            raise ConfigError(problem, key="data.template", value=self.template)
        for name in RESERVED & (self.template_kwargs or {}).keys():
            problem = "is set when a conversation is rendered and cannot be passed to the template; remove it"
            raise ConfigError(problem, key="data.template_kwargs", value=name)
        trained_on = {os.path.realpath(path) for path in self.train if path != EMBEDDED}
        for path in self.held_out:
            if os.path.realpath(path) in trained_on:
                problem = f"'{path}' is also in data.train; hold out a file that is never trained on"
                raise ConfigError(problem, key="data.held_out", value=self.held_out)


@dataclass(frozen=True)
class PrepareSection:
    """Sources and outputs of prepare_data.py, which writes a training and a held-out file."""

    sources: tuple[str, ...] = option(
        (), "named sets (--sources lists them), hub ids (owner/name, owner/name:config:split), JSONL, JSON or Parquet files"
    )
    weights: tuple[float, ...] | None = option(
        None,
        "one weight per source: the relative number of conversations taken from it, as many as the scarcest source allows; "
        "null = take all conversations of every source",
    )
    max_samples: int | None = option(
        None, "maximum number of conversations taken from all sources together; null = no limit", at_least=1
    )
    held_out_share: float = option(
        0.02, "share of the conversations that is held out, chosen by a hash of their first question", at_least=0.0, at_most=0.5
    )
    output_dir: str = option("outputs/data", "folder for train.jsonl, held_out.jsonl and report.json")

    def __post_init__(self):
        weights = self.weights
        if weights is not None and len(weights) != len(self.sources):
            problem = f"has {len(weights)} weights for {len(self.sources)} prepare.sources; give one weight per source"
            raise ConfigError(problem, key="prepare.weights", value=weights)
        if weights is not None and min(weights, default=1.0) <= 0:
            raise ConfigError("expected weights above 0; leave a source out instead", key="prepare.weights", value=weights)
        if len(set(self.sources)) < len(self.sources):
            raise ConfigError("names a source twice; give it a larger weight", key="prepare.sources", value=self.sources)


@dataclass(frozen=True)
class RegenerateSection:
    """How regenerate_data.py replaces assistant turns by the target's own answers."""

    inputs: tuple[str, ...] = option((), "JSONL conversation files whose assistant turns are replaced")
    output: str | None = option(None, "JSONL file for the new conversations, in the order of the inputs")
    servers: tuple[str, ...] = option(
        (), "OpenAI-compatible servers of the target (SGLang, vLLM), all with the same load, e.g. http://localhost:30000/v1"
    )
    model: str | None = option(None, "name of the model on the servers; null = the model that they serve")
    concurrency: int = option(64, "concurrent requests per server", unit="requests", at_least=1)
    attempts: int = option(
        6, "maximum number of times a request is sent; then its conversation is left out", unit="requests", at_least=1
    )
    timeout_s: float = option(600.0, "time without a response after which a request is sent again", unit="s", at_least=0.1)
    max_new_tokens: int = option(4096, "maximum tokens per reply; a conversation with a longer reply is left out", at_least=1)
    temperature: float = option(
        0.0, "sampling temperature of the replies; 0 = greedy, as in most uses of a draft", at_least=0.0
    )

    def __post_init__(self):
        for server in self.servers:
            if not server.startswith(("http://", "https://")):
                problem = "expected addresses such as http://localhost:30000/v1"
                raise ConfigError(problem, key="regenerate.servers", value=self.servers)
