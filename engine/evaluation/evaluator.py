"""Measurement of acceptance on a set of prompts that is distributed over the ranks.

Both a training run and `measure_acceptance.py` use it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import compress, count

import torch
from transformers import PreTrainedTokenizerBase

from engine.config.sections import EvaluationSection
from engine.config.tree_shape import TreeShape
from engine.evaluation.acceptance import (
    ALL,
    AcceptanceCounts,
    AcceptanceReport,
    DecodedPrompt,
    Prompt,
    eos_ids,
    group_names,
    measure_acceptance,
)
from engine.evaluation.decoding import (
    Generation,
    PromptLookupDrafter,
    plain_decode,
    reads_trees,
    rolls_back,
    speculative_decode,
)
from engine.evaluation.replay import batched_replies, greedy_replies, packed, replay
from engine.evaluation.samples import Sample, sampled_prompts
from engine.evaluation.sampling import GREEDY, Sampling
from engine.hidden_states.finite import fault_of, find_faults, place_names
from engine.host.telemetry import Telemetry
from engine.models.draft_method import ServedDraft
from engine.models.drafter import Drafter, TargetReply
from engine.parallel.mesh import World
from engine.target.frozen import FrozenTarget

OnReply = Callable[[Prompt, Generation], None]
BATCH_SIZE = {"cpu": 1, "cuda": 32}  # prompts decoded together by default


class AcceptanceEvaluator:
    """Evaluator that decodes this rank's share of `prompts`; every report covers all ranks.

    If the target is not sharded and `evaluation.prompts_per_batch` is 1, prompts are decoded one
    at a time, plainly and then speculatively, and both are timed and compared. They take turns
    prompt by prompt, so that a machine that becomes slower or faster does so for both. With larger
    batches, the target decodes its greedy replies once, and drafters are replayed on them without
    timing. A sharded target, one whose cache cannot be rolled back, and one that cannot read the
    trees that are drafted always use replay.

    Sampled replies are decoded one at a time as well, and not compared. Each prompt of a rank has its own seed.

    Prompts for which the target's states are not finite are named and excluded from every report.
    """

    def __init__(
        self,
        section: EvaluationSection,
        target: FrozenTarget,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        world: World,
        telemetry: Telemetry,
        max_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> None:
        """Create an evaluator.

        max_tokens: limit of tokens in a forward without a cache. sampling: how the target chooses tokens.
        Raises ValueError if sampled replies are asked for, which need decoding, and the target cannot decode speculatively.
        """
        self._sampling = sampling
        self._section = section
        self._target = target
        self._world = world
        self._telemetry = telemetry
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids(target.model, tokenizer)
        self._group_names = group_names(prompts)
        self._prompts = prompts[world.rank :: world.size]
        self._max_tokens = max_tokens
        self._uses_cache = target.mesh.size == 1 and rolls_back(target)
        decodes_trees = section.tree.is_chain or reads_trees(target)
        self._batch_size = section.prompts_per_batch or BATCH_SIZE[target.device.type]
        can_decode = self._uses_cache and decodes_trees
        if not sampling.is_greedy and not can_decode:
            problem = "this target cannot decode speculatively here, so only greedy replies can be measured"
            raise ValueError(f"{problem}; use temperature 0")
        self._replays = sampling.is_greedy and not (can_decode and self._batch_size == 1)
        self._kept: list[tuple[Prompt, Generation]] = []  # some of the draft measured last
        self._is_checked = False  # whether prompts with states that are not finite have been excluded

    def measure_draft(self, draft: ServedDraft, on_reply: OnReply | None = None) -> AcceptanceReport:
        """Measure acceptance with a draft.

        on_reply: called with each of this rank's prompts and its generation.
        """
        return self.measure_groups(draft, on_reply)[ALL]

    def measure_groups(self, draft: ServedDraft, on_reply: OnReply | None = None) -> dict[str, AcceptanceReport]:
        """Measure acceptance with a draft, as `measure_draft` does.

        Returns a report over all prompts (`ALL`), and one per file and category if there are several.
        """
        self._kept = []
        indices = count()

        def keep(prompt: Prompt, generation: Generation) -> None:
            if next(indices) in sampled_prompts(len(self._prompts)):
                self._kept.append((prompt, generation))
            if on_reply is not None:
                on_reply(prompt, generation)

        if self._replays:
            drafters = draft.propose_along(self._replies, self._section.tree, self._max_tokens)
            return self._measure(self._replayed(drafters, self._section.num_steps), "with the draft", keep)
        return self._measure(self._decoded(lambda sampling: self._drafter(draft, sampling)), "with the draft", keep)

    @property
    def samples(self) -> list[Sample]:
        """Replies of the draft measured last to a few of this rank's prompts."""
        return [Sample.of(prompt, generation, self._tokenizer) for prompt, generation in self._kept]

    def measure_prompt_lookup(self) -> AcceptanceReport:
        """Measure acceptance with prompt lookup, the baseline without a draft."""
        if self._replays:
            drafters = [self._prompt_lookup() for _ in self._replies]
            return self._measure(self._replayed(drafters, self._section.num_steps), "with prompt lookup", None)[ALL]
        return self._measure(self._decoded(lambda sampling: self._prompt_lookup()), "with prompt lookup", None)[ALL]

    def measure_shapes(self, draft: ServedDraft, shapes: Sequence[TreeShape]) -> dict[TreeShape, dict[str, AcceptanceReport]]:
        """Measure acceptance for several shapes, by replay.

        Returns a report over all prompts (`ALL`), and one per file and category if there are several.

        shapes: with at most `evaluation.num_steps` steps.
        """
        measured = {}
        with self._telemetry.progress(len(shapes), "shapes") as progress:
            for shape, drafters in draft.propose_shapes(self._replies, shapes, self._max_tokens):
                measured[shape] = self._reports(self._replayed(drafters, shape.num_steps), shape.num_steps)
                progress.advance("shapes of trees")
        return {shape: measured[shape] for shape in shapes}

    def _drafter(self, draft: ServedDraft, sampling: Sampling) -> Drafter:
        """Return a new drafter for one prompt, which draws tokens if servers would."""
        of_drafts = sampling.of_drafts
        if of_drafts is None:
            return draft.drafter(self._section.tree)
        return draft.sampling_drafter(self._section.tree, of_drafts)

    def _prompt_lookup(self) -> PromptLookupDrafter:
        """Return the baseline, which drafts a chain as deep as the draft's tree."""
        return PromptLookupDrafter(self._section.num_steps)

    @cached_property
    def _replies(self) -> list[TargetReply]:
        prompts = [prompt.token_ids for prompt in self._prompts]
        max_new_tokens = self._section.max_new_tokens + self._section.num_steps  # a replay may read beyond the last token
        with self._telemetry.progress(len(prompts) * max_new_tokens, "tokens") as progress:

            def on_forward(num_tokens: int) -> None:
                progress.move_to(num_tokens, "tokens of replies")

            if self._uses_cache:
                replies = batched_replies(
                    self._target,
                    prompts,
                    max_new_tokens=max_new_tokens,
                    eos_ids=self._eos_ids,
                    batch_size=self._batch_size,
                    on_forward=on_forward,
                )
            else:
                replies = greedy_replies(
                    self._target,
                    prompts,
                    max_new_tokens=max_new_tokens,
                    eos_ids=self._eos_ids,
                    max_tokens=self._max_tokens,
                    on_forward=on_forward,
                )
        return list(compress(replies, self._leave_out([reply.token_ids for reply in replies])))

    def _leave_out(self, replies: Sequence[list[int]]) -> list[bool]:
        """Warn about the prompts whose hidden states are not finite, and exclude them; a collective if ranks share the target.

        replies: token ids of the reply to each prompt. Returns which prompts remain.
        """
        faults = [self._first_fault(prompt, reply) for prompt, reply in zip(self._prompts, replies, strict=True)]
        self._target.join_other_forwards()
        for fault in faults:
            if fault is not None:
                self._telemetry.warn(f"  {fault}; it is left out of the measurement")
        is_good = [fault is None for fault in faults]
        self._prompts = list(compress(self._prompts, is_good))
        return is_good

    def _first_fault(self, prompt: Prompt, reply_ids: list[int]) -> str | None:
        """Return a message on the first states of a prompt and its reply that are not finite, or None."""
        batch = packed([prompt.token_ids + reply_ids[:-1]])
        output = self._target(batch, torch.arange(len(prompt.token_ids) - 1, batch.num_tokens))
        faults = find_faults(batch.to(self._target.device), output, embed_TD=None)
        (by_place,) = faults.by_place.tolist()
        if not any(by_place):
            return None
        place = place_names(self._target.aux_layers)[by_place.index(True)]
        return fault_of(f"held-out prompt {prompt.source}", place)

    def _replayed(self, drafters: Sequence[Drafter], num_steps: int) -> Iterator[DecodedPrompt]:
        """Replay one drafter on each reply. num_steps: largest depth of their trees."""
        replies = self._replies  # finds the prompts that are left out
        for prompt, reply, drafter in zip(self._prompts, replies, drafters, strict=True):
            generation = replay(
                reply,
                drafter,
                max_new_tokens=self._section.max_new_tokens,
                num_steps=num_steps,
                eos_ids=self._eos_ids,
            )
            yield DecodedPrompt(prompt, generation, plain=None)

    def _decoded(self, make_drafter: Callable[[Sampling], Drafter]) -> Iterator[DecodedPrompt]:
        """Decode the prompts one at a time, each with a new drafter, and greedy replies plainly as well."""
        for index, prompt in enumerate(self._prompts):
            plain = self._decoded_plainly(prompt) if self._sampling.is_greedy else None
            sampling = replace(self._sampling, seed=self._sampling.seed + index)
            generation = speculative_decode(
                self._target,
                make_drafter(sampling),
                prompt.token_ids,
                max_new_tokens=self._section.max_new_tokens,
                eos_ids=self._eos_ids,
                sampling=sampling,
            )
            yield DecodedPrompt(prompt, generation, plain)

    def _decoded_plainly(self, prompt: Prompt) -> Generation:
        return plain_decode(self._target, prompt.token_ids, self._section.max_new_tokens, self._eos_ids)

    def _measure(
        self, decoded: Iterator[DecodedPrompt], drafting: str, on_reply: OnReply | None
    ) -> dict[str, AcceptanceReport]:
        """Return the reports over the prompts of all ranks; a collective."""
        if not self._is_checked and not self._replays and self._sampling.is_greedy:
            self._leave_out([self._decoded_plainly(prompt).token_ids for prompt in self._prompts])
        self._is_checked = True
        with self._telemetry.progress(len(self._prompts), "prompts") as progress:

            def shown() -> Iterator[DecodedPrompt]:
                for prompt in decoded:
                    progress.advance(f"prompts, {drafting}")
                    if on_reply is not None:
                        on_reply(prompt.prompt, prompt.generation)
                    yield prompt

            return self._reports(shown(), self._section.num_steps)

    def _reports(self, decoded: Iterator[DecodedPrompt], num_steps: int) -> dict[str, AcceptanceReport]:
        """Return the reports over the prompts of all ranks (`ALL`), and per group if there are several; a collective."""
        measured = measure_acceptance(decoded, num_steps, self._group_names)
        reports = {}
        for name, counts in measured.items():
            total = self._world.sum(counts.to_tensor().to(self._world.device)).cpu()
            reports[name] = AcceptanceCounts.from_tensor(total).report()
        return reports
