"""Acceptance length on a set of prompts, shared out over the ranks: what a run and `measure_acceptance.py` both measure."""

from collections.abc import Callable, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from engine.config import EvaluationSection
from engine.decode import ChainDrafter, Drafter, Generation, PromptLookupDrafter, greedy_decode
from engine.evaluate import AcceptanceCounts, AcceptanceReport, Prompt, eos_ids, measure_acceptance
from engine.models.eagle3 import ServedDraft
from engine.parallel.mesh import World
from engine.target.frozen import FrozenTarget
from engine.telemetry import Telemetry

OnReply = Callable[[Prompt, Generation], None]


class HeldOut:
    """Speculative decoding of this rank's share of `prompts`; every report is over all ranks."""

    def __init__(
        self,
        section: EvaluationSection,
        target: FrozenTarget,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        world: World,
        telemetry: Telemetry,
    ) -> None:
        self._section, self._target, self._world, self._telemetry = section, target, world, telemetry
        self._eos_ids = eos_ids(target.model, tokenizer)
        self._prompts = prompts[world.rank :: world.size]

    def measure_draft(self, draft: ServedDraft, on_reply: OnReply | None = None) -> AcceptanceReport:
        """on_reply is called with each prompt and what was generated with the draft's help."""
        return self._measure(lambda: ChainDrafter(draft), "with the draft", on_reply)

    def measure_prompt_lookup(self) -> AcceptanceReport:
        """The baseline that needs no draft."""
        return self._measure(PromptLookupDrafter, "with prompt lookup", None)

    @cached_property
    def _plain(self) -> list[Generation]:
        limit, generations = self._section.max_new_tokens, []
        with self._telemetry.progress(len(self._prompts), "prompts") as progress:
            for prompt in self._prompts:
                generations.append(greedy_decode(self._target, prompt.token_ids, limit, self._eos_ids))
                progress.advance("prompts, plain greedy decoding")
        return generations

    def _measure(self, make_drafter: Callable[[], Drafter], drafting: str, on_reply: OnReply | None) -> AcceptanceReport:
        plain = self._plain
        with self._telemetry.progress(len(self._prompts), "prompts") as progress:

            def decoded(prompt: Prompt, generation: Generation) -> None:
                progress.advance(f"prompts, {drafting}")
                if on_reply is not None:
                    on_reply(prompt, generation)

            counts = measure_acceptance(
                self._target,
                make_drafter,
                self._prompts,
                draft_tokens=self._section.draft_tokens,
                max_new_tokens=self._section.max_new_tokens,
                eos_ids=self._eos_ids,
                plain=plain,
                on_reply=decoded,
            )
        total = self._world.sum(counts.to_tensor().to(self._world.device)).cpu()
        return AcceptanceCounts.from_tensor(total).report()
