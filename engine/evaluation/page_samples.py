"""Section of a run's report: replies to held-out prompts, coloured by where each token came from."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from engine.evaluation.page_parts import escaped, of_run
from engine.evaluation.run_record import RunRecord
from engine.evaluation.samples import MOST_TOKENS, NUM_SAMPLES
from engine.host.telemetry import visible

SHADES = 7  # of depths; deeper tokens share the last one
LONGEST_TOKEN = 100  # characters of a token that are shown
LONGEST_PROMPT = 2000  # characters at the end of a prompt that are shown


def samples_section(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return the replies, or "" if there are none. Raises an error for lines that are no samples."""
    samples = run.samples[:NUM_SAMPLES]
    if not samples:
        return ""
    deepest = max((depth for sample in samples for depth in sample["depths"]), default=0)
    step = f"{samples[0]['step']:,}"
    parts = [f"<h2>Replies to held-out prompts{of_run(run, runs)}</h2>"]
    parts.append(f'<p class="quiet">Drafted with the draft of step {step}. {_legend(deepest)}</p>')
    parts += [_sample(sample) for sample in samples]
    return "".join(parts)


def _legend(deepest: int) -> str:
    keys = ['<span class="token">the target\'s own token</span>']
    for depth in range(1, min(deepest, SHADES) + 1):
        name = f"{_ordinal(depth)} drafted token" if depth == 1 else _ordinal(depth)
        or_later = " or later" if depth == SHADES < deepest else ""
        keys.append(f'<span class="token depth{depth}">{name}{or_later}</span>')
    return f'<span class="legend">{" ".join(keys)}</span> The thicker the line below a token, the deeper it was drafted.'


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(0 if number % 100 in (11, 12, 13) else number % 10, "th")
    return f"{number}{ending}"


def _sample(sample: Mapping[str, Any]) -> str:
    num_tokens, num_forwards = int(sample["num_tokens"]), int(sample["num_forwards"])
    per_forward = (num_tokens - 1) / max(1, num_forwards)
    facts = f"{num_tokens:,} tokens, {per_forward:.2f} per target forward"
    tokens = sample["tokens"][:MOST_TOKENS]
    spans = [_token(text, depth) for text, depth in zip(tokens, sample["depths"][:MOST_TOKENS], strict=True)]
    if len(tokens) < num_tokens:
        spans.append(f' <span class="quiet">... the first {len(tokens):,} tokens are shown</span>')
    prompt = html.escape(visible(sample["prompt"][-LONGEST_PROMPT:].strip()))
    return (
        f'<figure class="sample"><figcaption>{escaped(str(sample["source"]).rpartition("/")[2])}: {facts}</figcaption>'
        f'<div class="prompt">{prompt}</div><div class="reply">{"".join(spans)}</div></figure>'
    )


def _token(text: str, depth: int) -> str:
    shown = html.escape(visible(text[:LONGEST_TOKEN])).replace("\n", "↵\n")
    # A token that ends within a character has no text; the style sheet gives it a mark.
    piece = "" if text else " piece"
    note = "" if text else ", a part of the next character"
    if depth <= 0:
        return f'<span class="token{piece}" title="the target\'s own token{note}">{shown}</span>'
    origin = f"{_ordinal(depth)} drafted token{note}"
    return f'<span class="token depth{min(depth, SHADES)}{piece}" title="{origin}">{shown}</span>'
