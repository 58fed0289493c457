"""Acceptance length on a set of prompts, shared out over the ranks: what a run and `measure_acceptance.py` both measure."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import compress
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from engine.config.sections import EvaluationSection
from engine.evaluation.acceptance import AcceptanceCounts, AcceptanceReport, Prompt, eos_ids, measure_acceptance
from engine.evaluation.decoding import (
    ChainDrafter,
    Drafter,
    Generation,
    PromptLookupDrafter,
    greedy_decode,
    rolls_back,
    speculative_decode,
)
from engine.evaluation.replay import TargetReply, batched_replies, greedy_replies, packed, propose_along, replay
from engine.hidden_states.finite import fault_of, find_faults, place_names
from engine.host.telemetry import Telemetry
from engine.models.eagle3.draft import ServedDraft
from engine.parallel.mesh import World
from engine.target.frozen import FrozenTarget

Continued = TypeVar("Continued", Generation, TargetReply)
OnReply = Callable[[Prompt, Generation], None]
BATCH_SIZE = {"cpu": 1, "cuda": 32}  # prompts decoded together by default


class AcceptanceEvaluator:
    """Speculative decoding of this rank's share of `prompts`; every report is over all ranks.

    One prompt at a time where the target is whole and `evaluation.prompts_per_batch` is 1: that is timed
    and compared with plain greedy decoding. In larger batches the target decodes its greedy
    replies once, and drafters are judged by them, without times; so does a target that ranks
    share, or whose cache cannot roll back, whatever the batch size.

    Prompts for which the target's states are not finite are named and left out of every report.
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
    ) -> None:
        """max_tokens: of a forward without a cache."""
        self._section = section
        self._target = target
        self._world = world
        self._telemetry = telemetry
        self._eos_ids = eos_ids(target.model, tokenizer)
        self._prompts = prompts[world.rank :: world.size]
        self._max_tokens = max_tokens
        self._uses_cache = target.mesh.size == 1 and rolls_back(target)
        self._batch_size = section.prompts_per_batch or BATCH_SIZE[target.device.type]
        self._replays = not self._uses_cache or self._batch_size > 1

    def measure_draft(self, draft: ServedDraft, on_reply: OnReply | None = None) -> AcceptanceReport:
        """on_reply is called with each of this rank's prompts and what was generated with the draft's help."""
        if self._replays:
            drafters = propose_along(draft, self._replies, self._section.draft_tokens, self._max_tokens)
            return self._measure(self._replayed(drafters), "with the draft", on_reply)
        return self._measure(self._decoded(lambda: ChainDrafter(draft)), "with the draft", on_reply)

    def measure_prompt_lookup(self) -> AcceptanceReport:
        """The baseline that needs no draft."""
        if self._replays:
            drafters = [PromptLookupDrafter() for _ in self._replies]
            return self._measure(self._replayed(drafters), "with prompt lookup", None)
        return self._measure(self._decoded(PromptLookupDrafter), "with prompt lookup", None)

    @cached_property
    def _plain(self) -> list[Generation]:
        generations = []
        max_new_tokens = self._section.max_new_tokens
        with self._telemetry.progress(len(self._prompts), "prompts") as progress:
            for prompt in self._prompts:
                generations.append(greedy_decode(self._target, prompt.token_ids, max_new_tokens, self._eos_ids))
                progress.advance("prompts, plain greedy decoding")
        return self._without_faults(generations)

    @cached_property
    def _replies(self) -> list[TargetReply]:
        prompts = [prompt.token_ids for prompt in self._prompts]
        max_new_tokens = self._section.max_new_tokens
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
        return self._without_faults(replies)

    def _without_faults(self, continued: list[Continued]) -> list[Continued]:
        """Name the prompts whose states, or those of their replies, are not finite, and go on without them.

        continued: what each prompt was continued with. A collective where ranks share the target.
        """
        places = place_names(self._target.aux_layers)
        faults = []
        for prompt, reply in zip(self._prompts, continued, strict=True):
            faults.append(self._first_fault(prompt.token_ids, reply.token_ids))
        self._target.rest()
        for prompt, place in zip(self._prompts, faults, strict=True):
            if place is not None:
                problem = fault_of(f"held-out prompt {prompt.source}", places[place])
                self._telemetry.warn(f"  {problem}; it is left out of the measurement")
        is_good = [place is None for place in faults]
        self._prompts = list(compress(self._prompts, is_good))
        return list(compress(continued, is_good))

    def _first_fault(self, prompt_ids: list[int], reply_ids: list[int]) -> int | None:
        """Return the first place where the states of a prompt and its reply are not finite; None if there is none."""
        batch = packed([prompt_ids + reply_ids[:-1]])
        output = self._target(batch, torch.arange(len(prompt_ids) - 1, batch.num_tokens))
        faults = find_faults(batch.to(self._target.device), output, embed_TD=None)
        (by_place,) = faults.by_place.tolist()
        return by_place.index(True) if any(by_place) else None

    def _replayed(self, drafters: Sequence[Drafter]) -> Iterator[Generation]:
        """Lead a drafter along each reply."""
        for reply, drafter in zip(self._replies, drafters, strict=True):
            yield replay(
                reply,
                drafter,
                max_new_tokens=self._section.max_new_tokens,
                draft_tokens=self._section.draft_tokens,
                eos_ids=self._eos_ids,
            )

    def _decoded(self, make_drafter: Callable[[], Drafter]) -> Iterator[Generation]:
        """Decode one prompt after the other with a drafter of its own."""
        for prompt in self._prompts:
            yield speculative_decode(
                self._target,
                make_drafter(),
                prompt.token_ids,
                max_new_tokens=self._section.max_new_tokens,
                draft_tokens=self._section.draft_tokens,
                eos_ids=self._eos_ids,
            )

    def _measure(self, generations: Iterator[Generation], drafting: str, on_reply: OnReply | None) -> AcceptanceReport:
        plain = None if self._replays else self._plain
        with self._telemetry.progress(len(self._prompts), "prompts") as progress:

            def decoded(prompt: Prompt, generation: Generation) -> None:
                progress.advance(f"prompts, {drafting}")
                if on_reply is not None:
                    on_reply(prompt, generation)

            draft_tokens = self._section.draft_tokens
            counts = measure_acceptance(self._prompts, generations, draft_tokens, plain=plain, on_reply=decoded)
        total = self._world.sum(counts.to_tensor().to(self._world.device)).cpu()
        return AcceptanceCounts.from_tensor(total).report()
