"""The measurement a run makes on its held-out prompts, before and after training, shared out over its ranks."""

from collections.abc import Callable
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from engine.config import Config
from engine.decode import ChainDrafter, Drafter, Generation, PromptLookupDrafter, greedy_decode
from engine.evaluate import AcceptanceCounts, AcceptanceReport, eos_ids, held_out_prompts, measure_acceptance
from engine.models.eagle3 import ServedDraft
from engine.parallel.mesh import World
from engine.target.frozen import FrozenTarget


class HeldOut:
    """Speculative decoding of this rank's share of the held-out prompts; every report is over all ranks."""

    def __init__(self, config: Config, target: FrozenTarget, tokenizer: PreTrainedTokenizerBase, world: World) -> None:
        section, data = config.evaluation, config.data
        self._section, self._target, self._world = section, target, world
        self._eos_ids = eos_ids(target.model, tokenizer)
        wanted = section.num_prompts
        prompts = held_out_prompts(data.held_out, tokenizer, wanted, data.template_kwargs) if wanted else []
        self._prompts = prompts[world.rank :: world.size]

    def measure_draft(self, draft: ServedDraft) -> AcceptanceReport:
        return self._measure(lambda: ChainDrafter(draft))

    def measure_prompt_lookup(self) -> AcceptanceReport:
        """The baseline that needs no draft."""
        return self._measure(PromptLookupDrafter)

    @cached_property
    def _plain(self) -> list[Generation]:
        limit = self._section.max_new_tokens
        return [greedy_decode(self._target, prompt.token_ids, limit, self._eos_ids) for prompt in self._prompts]

    def _measure(self, make_drafter: Callable[[], Drafter]) -> AcceptanceReport:
        counts = measure_acceptance(
            self._target,
            make_drafter,
            self._prompts,
            draft_tokens=self._section.draft_tokens,
            max_new_tokens=self._section.max_new_tokens,
            eos_ids=self._eos_ids,
            plain=self._plain,
        )
        total = self._world.sum(counts.to_tensor().to(self._world.device)).cpu()
        return AcceptanceCounts.from_tensor(total).report()
