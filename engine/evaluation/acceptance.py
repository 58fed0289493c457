"""Acceptance length of a draft, measured by real speculative decoding on held-out prompts."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.config.sections import Config
from engine.data.dataset import check_template
from engine.data.documents import evenly_spread, outside_vocabulary
from engine.data.messages import BadSample, on_sample, parse, read_messages, written_text
from engine.data.preformatted import Markers
from engine.data.questions import category_of, with_conversation
from engine.data.template_input import accepted_roles
from engine.data.templates import ChatTemplate
from engine.evaluation.decoding import Generation

ALL = "all"  # name of the report over all prompts
FEWEST_PROMPTS = 5  # with fewer, the spread over prompts says little


def students_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's distribution, to 0.3% from 4 degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


@dataclass(frozen=True)
class Prompt:
    """A conversation up to its first assistant turn.

    source: the file and line it comes from, as `file:line`.
    token_ids: the prompt's token ids; they end with the generation prompt.
    category: the kind of question that a benchmark names; None = it names none.
    """

    source: str
    token_ids: list[int]
    category: str | None = None

    @property
    def group(self) -> tuple[str, str | None]:
        """What its acceptance is reported with: its file and its category."""
        return self.source.rpartition(":")[0], self.category


def group_names(prompts: Sequence[Prompt]) -> dict[tuple[str, str | None], str]:
    """Return a name of each group of prompts: its file's without folders and ending if it is the only such file.

    No group is named `ALL`.
    """
    groups = dict.fromkeys(prompt.group for prompt in prompts)
    files = {file for file, _ in groups}
    stems = [Path(file).stem for file in files]
    names = {}
    for file, category in groups:
        stem = Path(file).stem
        name = stem if stems.count(stem) == 1 and stem != ALL else file
        names[file, category] = name if category is None else f"{name}: {category}"
    return names


@dataclass(frozen=True)
class AcceptanceReport:
    """Results of speculative decoding over a set of prompts.

    acceptance_length: tokens emitted per target forward. The forward over the prompt and the token
    that it yields do not count.
    confidence: half the width of its 95% confidence interval, from the spread over prompts; None
    with fewer than `FEWEST_PROMPTS`.
    acceptance_per_depth: among the target forwards that accepted all drafted tokens before a depth, the
    share that accepted one at this depth; None for a depth that was never reached.
    tokens_per_s, plain_tokens_per_s: generated tokens per second on one rank, with and without
    drafting, after the target has read the prompt; None if nothing was timed.
    mismatches: number of prompts whose tokens differ from plain greedy decoding; None if no prompt
    was decoded plainly.
    num_forwards: target forwards after those over the prompts; None in reports of earlier versions.
    """

    acceptance_length: float
    acceptance_per_depth: list[float | None]
    tokens_per_s: float | None
    plain_tokens_per_s: float | None
    num_prompts: int
    num_tokens: int
    mismatches: int | None
    confidence: float | None = None
    num_forwards: int | None = None

    @property
    def length_text(self) -> str:
        """The acceptance length with its confidence interval, for tables."""
        spread = "" if self.confidence is None else f" ±{self.confidence:.2f}"
        return f"{self.acceptance_length:.2f}{spread}"

    @property
    def depths_text(self) -> str:
        """The percentages per depth, for tables."""
        return " ".join("-" if share is None else f"{100 * share:.0f}" for share in self.acceptance_per_depth)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class AcceptanceCounts:
    """Sums over prompts. The counts of several ranks can be added as objects or as tensors.

    reached_per_depth: target forwards over trees of at least this depth that accepted all drafted tokens
    before it. accepted_per_depth: target forwards that accepted one at this depth.
    num_tokens: generated tokens, without the first token of each prompt, which the target yields
    when it reads the prompt.
    num_compared, mismatches, plain_tokens, plain_seconds: count only the prompts that were also
    decoded plainly.
    squared_tokens, squared_forwards, tokens_by_forwards: sums of each prompt's tokens squared,
    forwards squared, and their product.
    """

    reached_per_depth: tuple[int, ...]
    accepted_per_depth: tuple[int, ...]
    num_prompts: int = 0
    num_tokens: int = 0
    num_forwards: int = 0
    seconds: float = 0.0
    num_compared: int = 0
    mismatches: int = 0
    plain_tokens: int = 0
    plain_seconds: float = 0.0
    squared_tokens: int = 0
    squared_forwards: int = 0
    tokens_by_forwards: int = 0

    @classmethod
    def zero(cls, num_steps: int) -> "AcceptanceCounts":
        return cls((0,) * num_steps, (0,) * num_steps)

    @classmethod
    def of(cls, generation: Generation, plain: Generation | None, num_steps: int) -> "AcceptanceCounts":
        """Return the counts of one prompt. plain: its plain greedy decoding, if available."""
        reached = [0] * num_steps
        accepted = [0] * num_steps
        for num_proposed, num_accepted in zip(generation.proposed_per_forward, generation.accepted_per_forward, strict=True):
            for depth in range(num_proposed):
                reached[depth] += num_accepted >= depth
                accepted[depth] += num_accepted > depth
        num_tokens = len(generation.token_ids) - 1
        num_forwards = generation.num_target_forwards
        return cls(
            tuple(reached),
            tuple(accepted),
            num_prompts=1,
            num_tokens=num_tokens,
            num_forwards=num_forwards,
            squared_tokens=num_tokens**2,
            squared_forwards=num_forwards**2,
            tokens_by_forwards=num_tokens * num_forwards,
            seconds=generation.seconds,
            num_compared=int(plain is not None),
            mismatches=int(plain is not None and plain.token_ids != generation.token_ids),
            plain_tokens=len(plain.token_ids) - 1 if plain else 0,
            plain_seconds=plain.seconds if plain else 0.0,
        )

    def __add__(self, other: "AcceptanceCounts") -> "AcceptanceCounts":
        return self.from_tensor(self.to_tensor() + other.to_tensor())

    def to_tensor(self) -> torch.Tensor:
        """Return the counts as an fp64 tensor [2K + 11] that can be summed over ranks.

        K is the largest depth of drafted tokens. Counts below 2**53 are exact.
        """
        reached, accepted, *rest = astuple(self)
        return torch.tensor([*reached, *accepted, *rest], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, counts: torch.Tensor) -> "AcceptanceCounts":
        """Return the counts that `to_tensor` turned into a tensor."""
        scalars = fields(cls)[2:]
        values = counts.tolist()
        per_depth = [int(value) for value in values[: -len(scalars)]]
        num_steps = len(per_depth) // 2
        rest: list[Any] = []
        for field, value in zip(scalars, values[-len(scalars) :], strict=True):
            number: Any = field.type  # int for counts, float for seconds
            rest.append(number(value))
        return cls(tuple(per_depth[:num_steps]), tuple(per_depth[num_steps:]), *rest)

    def confidence(self) -> float | None:
        """Return half the width of the 95% confidence interval of the acceptance length, a ratio of sums over prompts.

        Source: Cochran, Sampling Techniques, section 2.11, with Student's quantile for the number of prompts.
        """
        if self.num_prompts < FEWEST_PROMPTS or not self.num_forwards:
            return None
        ratio = self.num_tokens / self.num_forwards
        squares = self.squared_tokens - 2 * ratio * self.tokens_by_forwards + ratio**2 * self.squared_forwards
        variance = max(0.0, squares) / (self.num_prompts - 1) * self.num_prompts / self.num_forwards**2
        return students_quantile(self.num_prompts - 1) * math.sqrt(variance)

    def report(self) -> AcceptanceReport:
        """Return the ratios of the sums. Without any forward, the acceptance length is 1."""
        depths = zip(self.accepted_per_depth, self.reached_per_depth, strict=True)
        return AcceptanceReport(
            acceptance_length=self.num_tokens / self.num_forwards if self.num_forwards else 1.0,
            acceptance_per_depth=[accepted / reached if reached else None for accepted, reached in depths],
            tokens_per_s=self.num_tokens / self.seconds if self.seconds else None,
            plain_tokens_per_s=self.plain_tokens / self.plain_seconds if self.plain_seconds else None,
            num_prompts=self.num_prompts,
            num_tokens=self.num_tokens,
            mismatches=self.mismatches if self.num_compared else None,
            confidence=self.confidence(),
            num_forwards=self.num_forwards,
        )


class DecodedPrompt(NamedTuple):
    """A prompt and its reply.

    generation: the reply, with drafted tokens. plain: its plain greedy decoding, to compare with, if available.
    """

    prompt: Prompt
    generation: Generation
    plain: Generation | None


def measure_acceptance(
    decoded: Iterable[DecodedPrompt], num_steps: int, names: Mapping[tuple[str, str | None], str]
) -> dict[str, AcceptanceCounts]:
    """Return the summed acceptance counts of all prompts (`ALL`), and of each group if there are several.

    decoded: each prompt with its reply, which is produced on demand. num_steps: largest depth of drafted tokens.
    names: of the groups, from `group_names`; also of those without a prompt in `decoded`.
    """
    groups = names.values() if len(names) > 1 else ()
    totals = {name: AcceptanceCounts.zero(num_steps) for name in (ALL, *groups)}
    for prompt, generation, plain in decoded:
        counts = AcceptanceCounts.of(generation, plain, num_steps)
        totals[ALL] += counts
        if groups:
            totals[names[prompt.group]] += counts
    return totals


def read_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the held-out prompts of a recipe, as `held_out_prompts` does; none if it measures no acceptance."""
    count = config.evaluation.num_prompts
    if count == 0:
        return []
    return held_out_prompts(config.data.held_out, tokenizer, count, config.data.template_kwargs)


def held_out_prompts(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    template_kwargs: Mapping[str, Any] | None,
) -> list[Prompt]:
    """Return `count` prompts spread evenly over JSONL conversations.

    Returns all prompts if there are fewer. The choice is deterministic. A prompt consists of the
    turns before the first assistant turn. Rows of benchmarks, see `engine/data/questions.py`, are read too.
    Conversations are skipped if they cannot be read, start with the assistant, or are refused by
    the chat template.
    Raises ValueError for a missing file, files without any prompt, or a tokenizer without a
    usable chat template.
    """
    check_template(tokenizer, template_kwargs)
    openings = [opening for path in paths for opening in _openings(Path(path))]
    if not openings:
        raise ValueError(
            f"{', '.join(map(str, paths))}: no conversation has a user turn before its first assistant turn, "
            "so there are no prompts"
        )
    count = min(count, len(openings))
    prompts = []
    problem = None
    for path, number, offset in (openings[index] for index in evenly_spread(len(openings), count)):
        source = f"{path}:{number}"
        try:
            with path.open("rb") as file:
                file.seek(offset)
                sample = parse(file.readline())
            text = _prompt_text(with_conversation(sample), tokenizer, template_kwargs)
            token_ids = on_sample(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"]
            prompts.append(Prompt(source, token_ids, category_of(sample)))
        except BadSample as error:
            problem = f"{source} {error}"
    if not prompts:
        advice = "fix the conversations or data.template_kwargs"
        raise ValueError(f"the chat template accepts none of {count} held-out prompts: {problem}; {advice}")
    return prompts


def check_prompts(prompts: Sequence[Prompt], vocab_size: int) -> None:
    """Raise ValueError, naming the prompt, if a token id lies outside the target's vocabulary."""
    for prompt in prompts:
        largest = max(prompt.token_ids, default=-1)
        if largest >= vocab_size:
            raise ValueError(outside_vocabulary(f"held-out prompt {prompt.source}", largest, vocab_size))


def _openings(path: Path) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, line number, byte offset) of each conversation that starts with a prompt.

    Preformatted text is yielded without a check for a user turn.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected JSONL with one conversation per line")
    next_offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            offset = next_offset
            next_offset = next_offset + len(line)
            try:
                sample = with_conversation(parse(line))
                if written_text(sample) is None:
                    before = itertools.takewhile(lambda message: message["role"] != "assistant", read_messages(sample)[0])
                    if all(message["role"] != "user" for message in before):
                        continue
            except BadSample:
                continue
            yield path, number, offset


def _prompt_text(sample: Any, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None) -> str:
    """Return the text that a server reads before the first reply. Raises BadSample."""
    text = written_text(sample)
    if text is None:
        messages, extra = read_messages(sample)
        before = list(itertools.takewhile(lambda message: message["role"] != "assistant", messages))
        template = ChatTemplate(tokenizer, {**extra, **(template_kwargs or {})})
        return template.text(accepted_roles(before, template), add_generation_prompt=True)
    replies = Markers.of(tokenizer, template_kwargs).find(text)
    if not replies:
        raise BadSample("no assistant turn", "the text contains no reply header")
    return text[: replies[0][0]]


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return all end token ids of the generation config, the text config and the tokenizer."""
    named = (
        model.generation_config.eos_token_id,
        model.config.get_text_config(decoder=True).eos_token_id,
        tokenizer.eos_token_id,
    )
    ids: set[int] = set()
    for value in named:
        ids.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return frozenset(ids)
