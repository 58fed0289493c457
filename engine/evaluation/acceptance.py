"""How much a draft helps: acceptance length by real speculative decoding on held-out prompts."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.dataset import check_template
from engine.data.documents import outside_vocabulary
from engine.data.messages import BadSample, on_sample, parse, read_messages, written_text
from engine.data.preformatted import Markers
from engine.data.template_input import accepted_roles
from engine.data.templates import ChatTemplate
from engine.evaluation.decoding import Generation


@dataclass(frozen=True)
class Prompt:
    """A conversation up to its first reply. source: file:line it came from. token_ids: ends with the generation prompt."""

    source: str
    token_ids: list[int]


@dataclass(frozen=True)
class AcceptanceReport:
    """What speculative decoding gave over a set of prompts.

    acceptance_length: tokens emitted per target forward; the prompt's forward and the token it gives do not count.
    acceptance_per_depth: at each depth, share accepted of the drafted tokens whose predecessors were; None = never reached.
    tokens_per_s, plain_tokens_per_s: generated tokens a second on one rank, after the target has read the prompt.
    mismatches: prompts whose tokens differ from plain greedy decoding. None, as rates: nothing was timed, or to compare with.
    """

    acceptance_length: float
    acceptance_per_depth: list[float | None]
    tokens_per_s: float | None
    plain_tokens_per_s: float | None
    num_prompts: int
    num_tokens: int
    mismatches: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class AcceptanceCounts:
    """Sums over prompts; those of several ranks add up, as objects or as tensors.

    reached_per_depth, accepted_per_depth: drafted tokens judged after accepted predecessors, and those accepted.
    num_tokens: generated tokens but the first of each prompt, which the target gives when it has read the prompt.
    num_compared, mismatches, plain_tokens, plain_seconds: of the prompts that were also decoded plainly.
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

    @classmethod
    def zero(cls, draft_tokens: int) -> "AcceptanceCounts":
        return cls((0,) * draft_tokens, (0,) * draft_tokens)

    @classmethod
    def of(cls, generation: Generation, plain: Generation | None, draft_tokens: int) -> "AcceptanceCounts":
        """The counts of one prompt, compared with its plain greedy decoding where that is given."""
        judged = list(zip(generation.proposed_per_forward, generation.accepted_per_forward, strict=True))
        return cls(
            tuple(sum(accepted >= depth < proposed for proposed, accepted in judged) for depth in range(draft_tokens)),
            tuple(sum(accepted > depth for _, accepted in judged) for depth in range(draft_tokens)),
            num_prompts=1,
            num_tokens=len(generation.token_ids) - 1,
            num_forwards=generation.num_target_forwards,
            seconds=generation.seconds,
            num_compared=int(plain is not None),
            mismatches=int(plain is not None and plain.token_ids != generation.token_ids),
            plain_tokens=len(plain.token_ids) - 1 if plain else 0,
            plain_seconds=plain.seconds if plain else 0.0,
        )

    def __add__(self, other: "AcceptanceCounts") -> "AcceptanceCounts":
        return self.from_tensor(self.to_tensor() + other.to_tensor())

    def to_tensor(self) -> torch.Tensor:
        """fp64 [2K + 8], exact for counts below 2**53: ready to be summed over ranks."""
        reached, accepted, *rest = astuple(self)
        return torch.tensor([*reached, *accepted, *rest], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, counts: torch.Tensor) -> "AcceptanceCounts":
        """The inverse of `to_tensor`."""
        scalars = fields(cls)[2:]
        values = counts.tolist()
        per_depth = [int(value) for value in values[: -len(scalars)]]
        draft_tokens = len(per_depth) // 2
        rest: list[Any] = []
        for field, value in zip(scalars, values[-len(scalars) :], strict=True):
            number: Any = field.type  # int, or float of seconds
            rest.append(number(value))
        return cls(tuple(per_depth[:draft_tokens]), tuple(per_depth[draft_tokens:]), *rest)

    def report(self) -> AcceptanceReport:
        """Ratios of the sums. Without any forward the acceptance length is 1: nothing was gained."""
        depths = zip(self.accepted_per_depth, self.reached_per_depth, strict=True)
        return AcceptanceReport(
            acceptance_length=self.num_tokens / self.num_forwards if self.num_forwards else 1.0,
            acceptance_per_depth=[accepted / reached if reached else None for accepted, reached in depths],
            tokens_per_s=self.num_tokens / self.seconds if self.seconds else None,
            plain_tokens_per_s=self.plain_tokens / self.plain_seconds if self.plain_seconds else None,
            num_prompts=self.num_prompts,
            num_tokens=self.num_tokens,
            mismatches=self.mismatches if self.num_compared else None,
        )


def measure_acceptance(
    prompts: Sequence[Prompt],
    generations: Iterable[Generation],
    draft_tokens: int,
    *,
    plain: Sequence[Generation] | None = None,
    on_reply: Callable[[Prompt, Generation], None] | None = None,
) -> AcceptanceCounts:
    """Add up what drafting gave. generations: one a prompt, made when asked for. plain: the same prompts decoded greedily.

    on_reply is called after each prompt. Raises ValueError where `generations` or `plain` are of other prompts.
    """
    if plain is not None and len(plain) != len(prompts):
        raise ValueError(f"plain holds {len(plain)} generations for {len(prompts)} prompts; decode the same prompts plainly")
    total = AcceptanceCounts.zero(draft_tokens)
    compared: Sequence[Generation | None] = plain or [None] * len(prompts)
    for prompt, generation, greedy in zip(prompts, generations, compared, strict=True):
        total += AcceptanceCounts.of(generation, greedy, draft_tokens)
        if on_reply is not None:
            on_reply(prompt, generation)
    return total


def held_out_prompts(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    template_kwargs: Mapping[str, Any] | None,
) -> list[Prompt]:
    """`count` prompts spread evenly over JSONL conversations, or all where there are fewer; the same ones every time.

    A prompt is what comes before the first assistant turn. Conversations that cannot be read, start with the assistant or are
    refused by the chat template are passed over. Raises ValueError for a missing file, files without any prompt, or a tokenizer
    without chat template.
    """
    check_template(tokenizer)
    openings = [opening for path in paths for opening in _openings(Path(path))]
    if not openings:
        raise ValueError(
            f"{', '.join(map(str, paths))}: no conversation with a turn before the assistant's first; nothing to ask"
        )
    count = min(count, len(openings))
    prompts = []
    problem = None
    for path, number, offset in (openings[index * len(openings) // count] for index in range(count)):
        source = f"{path}:{number}"
        try:
            with path.open("rb") as file:
                file.seek(offset)
                text = _prompt_text(parse(file.readline()), tokenizer, template_kwargs)
            prompts.append(Prompt(source, on_sample(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"]))
        except BadSample as error:
            problem = f"{source} {error}"
    if not prompts:
        advice = "mend them or data.template_kwargs"
        raise ValueError(f"none of {count} held-out prompts fits the chat template: {problem}; {advice}")
    return prompts


def check_prompts(prompts: Sequence[Prompt], vocab_size: int) -> None:
    """Raise ValueError, naming the prompt, if a token id is not one of the target's vocabulary."""
    for prompt in prompts:
        largest = max(prompt.token_ids, default=-1)
        if largest >= vocab_size:
            raise ValueError(outside_vocabulary(f"held-out prompt {prompt.source}", largest, vocab_size))


def _openings(path: Path) -> Iterator[tuple[Path, int, int]]:
    """(file, line, where it begins) of each conversation whose first reply answers somebody."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected JSONL with one conversation per line")
    next_offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            offset = next_offset
            next_offset = next_offset + len(line)
            try:
                sample = parse(line)
                if written_text(sample) is None:
                    before = itertools.takewhile(lambda message: message["role"] != "assistant", read_messages(sample)[0])
                    if all(message["role"] != "user" for message in before):
                        continue
            except BadSample:
                continue
            yield path, number, offset


def _prompt_text(sample: Any, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None) -> str:
    """What a server reads before the first reply. Raises BadSample."""
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
    """Every token id that ends a reply, as the generation config, the text config or the tokenizer names it."""
    named = (
        model.generation_config.eos_token_id,
        model.config.get_text_config(decoder=True).eos_token_id,
        tokenizer.eos_token_id,
    )
    ids: set[int] = set()
    for value in named:
        ids.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return frozenset(ids)
