"""Greedy replies of a target without a cache, and any drafter judged by them.

Speculative decoding emits the target's greedy reply whoever drafts: a drafter only changes how many forwards that takes. So a
target that ranks share, or whose cache cannot roll back, says its reply to each prompt once. A drafter is then led along it
with the target's own states: it drafts, is judged and reads on as in decoding with a cache, at no further forward.
Without a cache each forward reads everything again, of all prompts together, packed as in training.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from engine.batch import PackedBatch, TargetOutput
from engine.decode import Drafter, Generation, check_request, speculate
from engine.target.frozen import FrozenTarget


@dataclass(frozen=True)
class Reply:
    """What the target says to a prompt.

    token_ids: as of `greedy_decode`. aux_TA: [T, 3D], on the host: states of the prompt and of the reply but its last token.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    aux_TA: torch.Tensor


def greedy_replies(
    target: FrozenTarget,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    max_tokens: int,
    on_forward: Callable[[int], None] = lambda num_tokens: None,
) -> list[Reply]:
    """The reply to each prompt; a collective of the ranks that share the target, which bring prompts of their own, or none.

    max_tokens: read by a forward at most, unless one prompt alone holds more. on_forward is called with the number of tokens
    generated so far. Raises ValueError as `greedy_decode` does.
    """
    for prompt_ids in prompts:
        check_request(prompt_ids, max_new_tokens)
    said: list[list[int]] = [[] for _ in prompts]
    aux: dict[int, torch.Tensor] = {}
    unfinished = list(range(len(prompts)))
    while unfinished:
        lengths = [len(prompts[index]) + len(said[index]) for index in unfinished]
        together = unfinished[: _how_many_fit(lengths, max_tokens)]
        output, choices = _read_together(target, [prompts[index] + said[index] for index in together])
        for index, choice, aux_TA in zip(together, choices, output.aux_TA.split(lengths[: len(together)]), strict=True):
            said[index].append(choice)
            if choice in eos_ids or len(said[index]) == max_new_tokens:
                aux[index] = aux_TA.to("cpu", copy=True)
                unfinished.remove(index)
        on_forward(sum(map(len, said)))
    target.rest()
    return [Reply(prompt_ids, said[index], aux[index]) for index, prompt_ids in enumerate(prompts)]


@torch.inference_mode()
def replay(reply: Reply, drafter: Drafter, *, max_new_tokens: int, draft_tokens: int, eos_ids: Collection[int]) -> Generation:
    """What `speculative_decode` gives where `reply` was decoded under the same `max_new_tokens` and `eos_ids`; not timed."""
    whole = len(reply.token_ids) == max_new_tokens or reply.token_ids[-1] in eos_ids
    assert whole, f"a reply of {len(reply.token_ids)} tokens was decoded under other limits than {max_new_tokens}"
    limits = {"max_new_tokens": max_new_tokens, "draft_tokens": draft_tokens, "eos_ids": eos_ids}
    generation = speculate(_Replay(reply), drafter, reply.prompt_ids, reply.token_ids[:1], **limits)
    return replace(generation, seconds=0.0)


class _Replay:
    """A target that says `reply` again, as `speculate` asks it."""

    def __init__(self, reply: Reply) -> None:
        self._reply, self._first, self._end = reply, 0, len(reply.prompt_ids)

    def read(self, token_ids: list[int], num_choices: int) -> list[int]:
        self._first, self._end = self._end, self._end + len(token_ids)
        end = self._end + 1 - len(self._reply.prompt_ids)
        return self._reply.token_ids[end - num_choices : end]

    def aux(self) -> torch.Tensor:
        return self._reply.aux_TA[self._first : self._end]

    def forget(self, count: int) -> None:
        self._end -= count


def _how_many_fit(lengths: Sequence[int], max_tokens: int) -> int:
    """The first so many of these documents share a forward."""
    return max(1, sum(total <= max_tokens for total in accumulate(lengths)))


def _read_together(target: FrozenTarget, documents: Sequence[list[int]]) -> tuple[TargetOutput, list[int]]:
    """A forward over whole documents, and the target's choice after each of them."""
    ids_T = torch.tensor([token_id for document in documents for token_id in document])
    cu_seqlens = torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32)
    output = target(PackedBatch(ids_T, torch.zeros_like(ids_T, dtype=torch.bool), cu_seqlens), cu_seqlens[1:].long() - 1)
    return output, output.argmax_N.tolist()
