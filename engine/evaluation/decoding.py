"""Greedy speculative decoding: a drafter proposes tokens, and one target forward verifies them all.

The committed tokens are `x[0..n]`. The target has not read `x[n]` yet: its cache and its auxiliary
hidden states end at `n-1`. The draft reads these states and `x[n]`, and proposes `x[n+1]` and the
tokens after it. One target forward reads `x[n]` and the proposals. The proposals that equal the
target's own choices are accepted, and the target's next choice is added to them. What a draft keeps
of earlier tokens is computed from the target's states only, so rejected tokens leave no trace.
"""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import DynamicCache

from engine.models.drafter import Drafter
from engine.models.target_families import cache_rolls_back
from engine.target.frozen import ForwardCapture, FrozenTarget, capture


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt, and its cost.

    token_ids: generated tokens. If there is an end token, it is the last one.
    num_target_forwards: target forwards after the one over the prompt.
    proposed_per_forward, accepted_per_forward: drafted tokens that were judged, and those that were
    accepted. Tokens drafted after an end token are not judged.
    seconds: time from the first generated token to the last, including the time in which the
    drafter reads the prompt; 0 for generations without a cache, where time has no meaning.
    """

    token_ids: list[int]
    num_target_forwards: int
    proposed_per_forward: list[int]
    accepted_per_forward: list[int]
    seconds: float


class Reader(Protocol):
    """Interface through which `speculate` uses a target that has read a prompt."""

    def read(self, token_ids: list[int], num_choices: int) -> list[int]:
        """Read tokens and return the target's choice after each of the last `num_choices` of them.

        A reader of a finished reply returns fewer choices if the reply ends before the last token.
        """
        ...

    def aux(self) -> torch.Tensor:
        """Return the auxiliary states of the tokens that were read last, [Q, A * D]."""
        ...

    def forget(self, count: int) -> None:
        """Remove the newest `count` tokens."""
        ...


class PromptLookupDrafter:
    """Drafter that proposes the tokens after the latest earlier occurrence of the newest tokens.

    It looks for the newest `max_ngram` tokens first, then for fewer. This baseline needs no draft.
    Source: prompt lookup decoding (Saxena, 2023).
    """

    def __init__(self, max_ngram: int = 3) -> None:
        self.max_ngram = max_ngram

    def start(self, token_ids: list[int], aux_TA: torch.Tensor) -> None:
        self.token_ids: list[int] = []
        self.continuation: dict[tuple[int, ...], int] = {}
        self.extend(token_ids, aux_TA)

    def extend(self, token_ids: list[int], aux_QA: torch.Tensor) -> None:
        for token_id in token_ids:
            for ngram in self._newest_ngrams():
                self.continuation[ngram] = len(self.token_ids)
            self.token_ids.append(token_id)

    def propose(self, count: int) -> list[int]:
        for ngram in self._newest_ngrams():
            if ngram in self.continuation:
                start = self.continuation[ngram]
                return self.token_ids[start : start + count]
        return []

    def _newest_ngrams(self) -> Iterator[tuple[int, ...]]:
        for size in range(min(self.max_ngram, len(self.token_ids)), 0, -1):
            yield tuple(self.token_ids[-size:])


@dataclass
class _CachedReader:
    """A target, its cache, and the states captured in its last forward."""

    target: FrozenTarget
    seen: ForwardCapture
    cache: DynamicCache

    def read(self, token_ids: list[int], num_choices: int) -> list[int]:
        """Read tokens and return the target's choice after each of the last `num_choices`."""
        device = self.target.device
        ids_1T = torch.tensor([token_ids], device=device)
        self.target.decoder(input_ids=ids_1T, past_key_values=self.cache, use_cache=True)
        return self.target.whole_head().logits(self.seen.last_hidden()[0, -num_choices:]).argmax(-1).tolist()

    def aux(self) -> torch.Tensor:
        return self.seen.aux()[0]

    def prepare_to_forget(self) -> None:
        """Make the cache keep what `forget` needs.

        Raises ValueError if the target's cache cannot be rolled back.
        """
        self.cache.activate_past_recording()
        if not rolls_back(self.target):
            kinds = sorted({type(layer).__name__ for layer in self.cache.layers if not layer.is_croppable}) or ["cache"]
            raise ValueError(
                f"target family {self.target.config.model_type!r} cannot decode speculatively: its {', '.join(kinds)} cannot "
                "forget rejected tokens; measure acceptance by replaying its greedy replies (engine/evaluation/replay.py)"
            )

    def forget(self, count: int) -> None:
        self.cache.crop(-count)


def rolls_back(target: FrozenTarget) -> bool:
    """Return whether the target's cache can drop rejected tokens, for `speculative_decode`."""
    cache = DynamicCache(config=target.model.config)
    cache.activate_past_recording()
    return cache.is_croppable and cache_rolls_back(target.config)


@contextmanager
def _reading(target: FrozenTarget, aux_layers: tuple[int, ...]) -> Iterator[_CachedReader]:
    with capture(target.model, aux_layers) as seen:
        yield _CachedReader(target, seen, DynamicCache(config=target.model.config))


@torch.inference_mode()
def greedy_decode(target: FrozenTarget, prompt_ids: list[int], max_new_tokens: int, eos_ids: Collection[int]) -> Generation:
    """Decode greedily, one token per forward, until an end token or `max_new_tokens` tokens."""
    check_request(prompt_ids, max_new_tokens)
    with _reading(target, aux_layers=()) as reader:
        token_ids = reader.read(prompt_ids, 1)
        began = time.perf_counter()
        while len(token_ids) < max_new_tokens and token_ids[-1] not in eos_ids:
            token_ids += reader.read(token_ids[-1:], 1)
    num_forwards = len(token_ids) - 1
    return Generation(token_ids, num_forwards, [0] * num_forwards, [0] * num_forwards, time.perf_counter() - began)


@torch.inference_mode()
def speculative_decode(
    target: FrozenTarget,
    drafter: Drafter,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    draft_tokens: int,
    eos_ids: Collection[int],
) -> Generation:
    """Decode greedily; each target forward verifies up to `draft_tokens` drafted tokens.

    The tokens equal those of `greedy_decode` as long as the target's argmax does not depend on the
    number of tokens in a forward. In low precision it can, if two logits are nearly equal.
    Raises ValueError for an invalid request, or a target whose cache cannot be rolled back.
    """
    check_request(prompt_ids, max_new_tokens)
    with _reading(target, target.aux_layers) as reader:
        first_ids = reader.read(prompt_ids, 1)
        reader.prepare_to_forget()
        return speculate(
            reader,
            drafter,
            prompt_ids,
            first_ids,
            max_new_tokens=max_new_tokens,
            draft_tokens=draft_tokens,
            eos_ids=eos_ids,
        )


def speculate(
    reader: Reader,
    drafter: Drafter,
    prompt_ids: list[int],
    first_ids: list[int],
    *,
    max_new_tokens: int,
    draft_tokens: int,
    eos_ids: Collection[int],
) -> Generation:
    """Run the loop of `speculative_decode` after the target has read the prompt.

    reader: a target that has read the prompt.
    first_ids: the one token that the target chose after the prompt.
    Raises ValueError if `draft_tokens` is less than 1.
    """
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens={draft_tokens}: expected at least 1; use greedy_decode to decode without a draft")
    token_ids = [*first_ids]
    proposed = []
    accepted = []
    began = time.perf_counter()
    drafter.start(prompt_ids + token_ids, reader.aux())
    while len(token_ids) < max_new_tokens and token_ids[-1] not in eos_ids:
        room = min(draft_tokens, max_new_tokens - len(token_ids) - 1)
        drafted = drafter.propose(room) if room else []
        assert len(drafted) <= room, f"{type(drafter).__name__} proposed {len(drafted)} tokens, at most {room} were asked for"
        choices = reader.read(token_ids[-1:] + drafted, len(drafted) + 1)
        num_accepted = _common_length(drafted, choices)
        new_ids = _up_to_end(choices[: num_accepted + 1], eos_ids)
        proposed.append(min(len(drafted), len(new_ids)) if new_ids[-1] in eos_ids else len(drafted))
        accepted.append(min(num_accepted, len(new_ids)))
        reader.forget(len(drafted) - num_accepted)
        drafter.extend(new_ids, reader.aux()[: len(new_ids)])
        token_ids += new_ids
    return Generation(token_ids, len(accepted), proposed, accepted, time.perf_counter() - began)


def check_request(prompt_ids: list[int], max_new_tokens: int) -> None:
    """Raise ValueError if the prompt is empty or `max_new_tokens` is less than 1."""
    if not prompt_ids:
        raise ValueError("the prompt has no tokens; expected at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")


def _common_length(drafted: list[int], choices: list[int]) -> int:
    pairs = enumerate(zip(drafted, choices, strict=False))
    return next((i for i, (token_id, choice) in pairs if token_id != choice), min(len(drafted), len(choices)))


def _up_to_end(token_ids: list[int], eos_ids: Collection[int]) -> list[int]:
    end = next((i for i, token_id in enumerate(token_ids) if token_id in eos_ids), len(token_ids))
    return token_ids[: end + 1]
