"""Acceptance length on a set of prompts, shared out over the ranks: what a run and `measure_acceptance.py` both measure."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from engine.config import EvaluationSection
from engine.decode import ChainDrafter, Drafter, Generation, PromptLookupDrafter, greedy_decode, rolls_back, speculative_decode
from engine.evaluate import AcceptanceCounts, AcceptanceReport, Prompt, eos_ids, measure_acceptance
from engine.models.eagle3 import ServedDraft
from engine.parallel.mesh import World
from engine.replies import Reply, greedy_replies, replay
from engine.target.frozen import FrozenTarget
from engine.telemetry import Telemetry

OnReply = Callable[[Prompt, Generation], None]


class HeldOut:
    """Speculative decoding of this rank's share of `prompts`; every report is over all ranks.

    With a cache where the target is whole, which is timed and compared with plain greedy decoding. A target that ranks share,
    or whose cache cannot roll back, says its greedy replies once, and drafters are judged by them.
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
        self._section, self._target, self._world, self._telemetry = section, target, world, telemetry
        self._until = {"max_new_tokens": section.max_new_tokens, "eos_ids": eos_ids(target.model, tokenizer)}
        self._prompts, self._max_tokens = prompts[world.rank :: world.size], max_tokens
        self._replays = target.mesh.size > 1 or not rolls_back(target)

    def measure_draft(self, draft: ServedDraft, on_reply: OnReply | None = None) -> AcceptanceReport:
        """on_reply is called with each of this rank's prompts and what was generated with the draft's help."""
        return self._measure(lambda: ChainDrafter(draft), "with the draft", on_reply)

    def measure_prompt_lookup(self) -> AcceptanceReport:
        """The baseline that needs no draft."""
        return self._measure(PromptLookupDrafter, "with prompt lookup", None)

    @cached_property
    def _plain(self) -> list[Generation]:
        generations = []
        with self._telemetry.progress(len(self._prompts), "prompts") as progress:
            for prompt in self._prompts:
                generations.append(greedy_decode(self._target, prompt.token_ids, **self._until))
                progress.advance("prompts, plain greedy decoding")
        return generations

    @cached_property
    def _replies(self) -> list[Reply]:
        prompts = [prompt.token_ids for prompt in self._prompts]
        with self._telemetry.progress(len(prompts) * self._section.max_new_tokens, "tokens") as progress:

            def on_forward(num_tokens: int) -> None:
                progress.move_to(num_tokens, "tokens of replies")

            return greedy_replies(self._target, prompts, **self._until, max_tokens=self._max_tokens, on_forward=on_forward)

    def _decoded(self, make_drafter: Callable[[], Drafter]) -> Iterator[Generation]:
        limits = self._until | {"draft_tokens": self._section.draft_tokens}
        if self._replays:
            return (replay(reply, make_drafter(), **limits) for reply in self._replies)
        prompts = (prompt.token_ids for prompt in self._prompts)
        return (speculative_decode(self._target, make_drafter(), token_ids, **limits) for token_ids in prompts)

    def _measure(self, make_drafter: Callable[[], Drafter], drafting: str, on_reply: OnReply | None) -> AcceptanceReport:
        plain, generations = None if self._replays else self._plain, self._decoded(make_drafter)
        with self._telemetry.progress(len(self._prompts), "prompts") as progress:

            def decoded(prompt: Prompt, generation: Generation) -> None:
                progress.advance(f"prompts, {drafting}")
                if on_reply is not None:
                    on_reply(prompt, generation)

            draft_tokens = self._section.draft_tokens
            counts = measure_acceptance(self._prompts, generations, draft_tokens, plain=plain, on_reply=decoded)
        total = self._world.sum(counts.to_tensor().to(self._world.device)).cpu()
        return AcceptanceCounts.from_tensor(total).report()
