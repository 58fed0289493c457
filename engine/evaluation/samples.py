"""Replies of a draft to a few held-out prompts, with the origin of each token, as the report shows them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from engine.data.documents import evenly_spread
from engine.data.segments import decoded
from engine.evaluation.acceptance import Prompt
from engine.evaluation.decoding import Generation
from engine.host.files import write_text

SAMPLES = "samples.jsonl"
NUM_SAMPLES = 4  # prompts per rank whose replies are kept
MOST_TOKENS = 400  # of a reply that are kept
PROMPT_TOKENS = 300  # at the end of a prompt that are kept
UNDECODABLE = "\ufffd"  # stands in a text for bytes that are not a whole character
MOST_PIECES = 4  # tokens that one character can be split into: it has at most four bytes in UTF-8
CONTEXT = 4  # tokens before a token that its text may depend on, such as by a space between words


@dataclass(frozen=True)
class Sample:
    """A held-out prompt and the beginning of its reply.

    source: the file and line of the prompt. prompt: its text; of a long prompt, the end.
    tokens: text of each token of the reply. A token that ends within a character has an empty text,
    and the token that completes the character has all of it.
    depths: 1 for the first token that the draft proposed in a verification, and so on; 0 for a
    token of the target itself.
    num_tokens, num_forwards: of the whole reply, which may be longer than `tokens`.
    """

    source: str
    prompt: str
    tokens: list[str]
    depths: list[int]
    num_tokens: int
    num_forwards: int

    @classmethod
    def of(cls, prompt: Prompt, generation: Generation, tokenizer: PreTrainedTokenizerBase) -> "Sample":
        token_ids = generation.token_ids[:MOST_TOKENS]
        start = max(0, len(prompt.token_ids) - PROMPT_TOKENS)
        prompt_text = decoded(prompt.token_ids[start:], tokenizer, clean_up_tokenization_spaces=False)
        return cls(
            source=prompt.source,
            prompt=("... " if start else "") + prompt_text,
            tokens=token_texts(token_ids, tokenizer),
            depths=token_depths(generation)[:MOST_TOKENS],
            num_tokens=len(generation.token_ids),
            num_forwards=generation.num_target_forwards,
        )


def token_depths(generation: Generation) -> list[int]:
    """Return the depth of each token of a reply, as in `Sample`.

    The target yields the first token when it has read the prompt, and one after each accepted run.
    """
    depths = [0]
    for num_accepted in generation.accepted_per_forward:
        depths += [*range(1, num_accepted + 1), 0]
    return depths[: len(generation.token_ids)]  # a reply may end within a run


def token_texts(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text that each token adds to the text before it.

    A token of a byte-level vocabulary may hold a part of a character. The text then belongs to the
    token that completes it.
    """

    def text_of(start: int, end: int) -> str:
        return decoded(list(token_ids[start:end]), tokenizer, clean_up_tokenization_spaces=False)

    texts = []
    begin = 0  # first token whose text has not been given out
    for end in range(1, len(token_ids) + 1):
        start = max(0, begin - CONTEXT)
        before = text_of(start, begin)
        after = text_of(start, end)
        is_whole = not after.endswith(UNDECODABLE) or end - begin >= MOST_PIECES or end == len(token_ids)
        texts.append(after[len(before) :] if is_whole else "")
        if is_whole:
            begin = end
    return texts


def sampled_prompts(num_prompts: int) -> set[int]:
    """Return the indices of the prompts whose replies are kept."""
    return set(evenly_spread(num_prompts, NUM_SAMPLES))


def write_samples(path: Path, samples: Sequence[Sample], step: int) -> None:
    """Write one line per sample. step: optimizer step of the draft. Raises WriteError."""
    lines = [json.dumps({"step": step, **asdict(sample)}) for sample in samples]
    write_text(path, "".join(f"{line}\n" for line in lines))
