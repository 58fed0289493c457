"""Speculative decoding: a drafter proposes tokens, and one target forward verifies them all.

The committed tokens are `x[0..n]`. The target has not read `x[n]` yet: its cache and its auxiliary
hidden states end at `n-1`. The draft reads these states and `x[n]`, and proposes a tree of tokens
that may follow; a chain is a tree without branches. One target forward reads `x[n]` and the tree. A
path of the tree is accepted as long as its tokens equal the target's own choices, or, if they were
drawn from the draft's distribution, by the rule in `sampling.py`. The target's next choice is added
to it. The other tokens of the tree leave the target's cache. What a draft keeps of earlier tokens is
computed from the target's states only, so rejected tokens leave no trace.
"""

import inspect
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import DynamicCache

from engine.evaluation.sampling import GREEDY, Sampling, TokenChoice
from engine.models.drafter import ROOT, Drafter, TokenTree
from engine.models.target_families import cache_rolls_back
from engine.target.frozen import ForwardCapture, FrozenTarget, capture
from engine.target.tree_attention import TreeRow, tree_attention


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt, and its cost.

    token_ids: generated tokens. If there is an end token, it is the last one.
    num_target_forwards: target forwards after the one over the prompt.
    proposed_per_forward, accepted_per_forward: largest depth of the drafted tokens that were judged,
    and number of those that were accepted. Tokens drafted after an end token are not judged. Those
    that were accepted beyond the last token of the reply count, as they do in a server.
    seconds: time from the first generated token to the last, including the time in which the
    drafter reads the prompt; 0 for generations without a cache, where time has no meaning.
    """

    token_ids: list[int]
    num_target_forwards: int
    proposed_per_forward: list[int]
    accepted_per_forward: list[int]
    seconds: float


@dataclass(frozen=True)
class Verified:
    """What follows the newest committed token.

    token_ids: accepted tokens, then the target's own next one. A finished reply may end before that.
    num_accepted: number of accepted tokens.
    """

    token_ids: list[int]
    num_accepted: int


class Reader(Protocol):
    """Interface through which `speculate` uses a target that has read a prompt."""

    def verify(self, newest_id: int, tree: TokenTree) -> Verified:
        """Read the newest committed token and the tree that may follow it; keep the accepted path."""
        ...

    def aux(self) -> torch.Tensor:
        """Return the auxiliary states of the newest token and of the accepted ones, [Q, A * D]."""
        ...


class PromptLookupDrafter:
    """Drafter that proposes the tokens after the latest earlier occurrence of the newest tokens.

    It looks for the newest `max_ngram` tokens first, then for fewer. This baseline needs no draft.
    Source: prompt lookup decoding (Saxena, 2023).
    """

    def __init__(self, num_tokens: int, max_ngram: int = 3) -> None:
        """Create a drafter. num_tokens: tokens proposed at most."""
        self.num_tokens = num_tokens
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

    def propose(self) -> TokenTree:
        for ngram in self._newest_ngrams():
            if ngram in self.continuation:
                start = self.continuation[ngram]
                return TokenTree.chain(self.token_ids[start : start + self.num_tokens])
        return TokenTree.chain([])

    def _newest_ngrams(self) -> Iterator[tuple[int, ...]]:
        for size in range(min(self.max_ngram, len(self.token_ids)), 0, -1):
            yield tuple(self.token_ids[-size:])


class _CachedReader:
    """A target, its cache, and the states captured in its last forward."""

    def __init__(self, target: FrozenTarget, seen: ForwardCapture, choice: TokenChoice) -> None:
        self._target = target
        self._seen = seen
        self._choice = choice
        self._cache = DynamicCache(config=target.model.config)
        self._num_cached = 0
        self._reads_trees = reads_trees(target)
        self._kept: list[int] = []  # of the tokens that were read last

    def read(self, token_ids: list[int]) -> int:
        """Read tokens and return the target's choice after the last one."""
        self._run(token_ids, None)
        self._kept = list(range(len(token_ids)))
        self._num_cached += len(token_ids)
        return int(self._choice(self._logits(1))[0])

    def verify(self, newest_id: int, tree: TokenTree) -> Verified:
        row = None
        if not self._reads_trees and not tree.is_chain:
            raise ValueError(
                f"target family {self._target.config.model_type!r} cannot read a tree of tokens in one forward; use topk=1, or "
                "measure acceptance by replaying its greedy replies (engine/evaluation/replay.py)"
            )
        if self._reads_trees:
            row = TreeRow(self._num_cached, [ROOT, *(parent + 1 for parent in tree.parents)], self._target.device)
        self._run([newest_id, *tree.token_ids], row)
        path, next_id = self._choice.judge(self._logits(len(tree) + 1), tree)
        self._kept = [0, *(node + 1 for node in path)]
        self._num_cached += len(self._kept)
        keep_newest(self._cache, len(tree) + 1, self._kept)
        return Verified([*(tree.token_ids[node] for node in path), next_id], len(path))

    def aux(self) -> torch.Tensor:
        aux_QA = self._seen.aux()[0]
        return aux_QA if len(self._kept) == len(aux_QA) else aux_QA[self._kept]

    def prepare_to_forget(self) -> None:
        """Make the cache able to drop rejected tokens.

        Raises ValueError if the target's cache cannot be rolled back.
        """
        self._cache.activate_past_recording()
        if not rolls_back(self._target):
            layers = self._cache.layers
            kinds = sorted({type(layer).__name__ for layer in layers if not layer.is_croppable}) or ["cache"]
            raise ValueError(
                f"target family {self._target.config.model_type!r} cannot decode speculatively: its {', '.join(kinds)} cannot "
                "forget rejected tokens; measure acceptance by replaying its greedy replies (engine/evaluation/replay.py)"
            )

    def _run(self, token_ids: list[int], row: TreeRow | None) -> None:
        ids_1N = torch.tensor([token_ids], device=self._target.device)
        decoder = self._target.decoder
        if row is None:
            decoder(input_ids=ids_1N, past_key_values=self._cache, use_cache=True)
            return
        with tree_attention(decoder, row):
            decoder(input_ids=ids_1N, position_ids=row.position_N[None], past_key_values=self._cache, use_cache=True)

    def _logits(self, count: int) -> torch.Tensor:
        """Return the logits after each of the last `count` tokens, [count, V]."""
        return self._target.whole_head().logits(self._seen.last_hidden()[0, -count:])


def keep_newest(cache: DynamicCache, num_read: int, kept: list[int]) -> None:
    """Drop tokens from the newest `num_read` of a cache. kept: those that stay, ascending, from 0."""
    is_prefix = kept == list(range(len(kept)))
    index_by_device: dict[torch.device, torch.Tensor] = {}
    for layer in cache.layers if not is_prefix else ():
        for held in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if held is None:  # of a layer that reads the cache of another one
                continue
            if held.device not in index_by_device:
                index_by_device[held.device] = torch.tensor(kept, device=held.device)
            first = held.shape[-2] - num_read
            newest = held[..., first:, :]
            held[..., first : first + len(kept), :] = newest[..., index_by_device[held.device], :]
    cache.crop(len(kept) - num_read)


def rolls_back(target: FrozenTarget) -> bool:
    """Return whether the target's cache can drop rejected tokens, for `speculative_decode`."""
    cache = DynamicCache(config=target.model.config)
    cache.activate_past_recording()
    return cache.is_croppable and cache_rolls_back(target.config)


def reads_trees(target: FrozenTarget) -> bool:
    """Return whether the target can read a tree of tokens in one forward, for `speculative_decode`."""
    return target.packs and "position_ids" in inspect.signature(target.decoder.forward).parameters


@contextmanager
def _reading(target: FrozenTarget, aux_layers: tuple[int, ...], sampling: Sampling) -> Iterator[_CachedReader]:
    with capture(target.model, aux_layers) as seen:
        yield _CachedReader(target, seen, sampling.choice(target.device))


@torch.inference_mode()
def plain_decode(
    target: FrozenTarget,
    prompt_ids: list[int],
    max_new_tokens: int,
    eos_ids: Collection[int],
    sampling: Sampling = GREEDY,
) -> Generation:
    """Decode one token per forward, until an end token or `max_new_tokens` tokens."""
    check_request(prompt_ids, max_new_tokens)
    with _reading(target, (), sampling) as reader:
        token_ids = [reader.read(prompt_ids)]
        began = time.perf_counter()
        while len(token_ids) < max_new_tokens and token_ids[-1] not in eos_ids:
            token_ids.append(reader.read(token_ids[-1:]))
    num_forwards = len(token_ids) - 1
    return Generation(token_ids, num_forwards, [0] * num_forwards, [0] * num_forwards, time.perf_counter() - began)


@torch.inference_mode()
def speculative_decode(
    target: FrozenTarget,
    drafter: Drafter,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    sampling: Sampling = GREEDY,
) -> Generation:
    """Decode a prompt; each target forward verifies the tree that the drafter proposes.

    Without sampling, the tokens equal those of `plain_decode` as long as the target's argmax does not
    depend on the number of tokens in a forward. In low precision it can, if two logits are nearly
    equal. With sampling, they have the same distribution.
    Raises ValueError for an invalid request, a target whose cache cannot be rolled back, or a tree
    that the target cannot read.
    """
    check_request(prompt_ids, max_new_tokens)
    with _reading(target, target.aux_layers, sampling) as reader:
        first_id = reader.read(prompt_ids)
        reader.prepare_to_forget()
        return speculate(reader, drafter, prompt_ids, first_id, max_new_tokens=max_new_tokens, eos_ids=eos_ids)


def speculate(
    reader: Reader,
    drafter: Drafter,
    prompt_ids: list[int],
    first_id: int,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
) -> Generation:
    """Run the loop of `speculative_decode` after the target has read the prompt.

    reader: a target that has read the prompt. first_id: the token that it chose after the prompt.
    """
    token_ids = [first_id]
    proposed = []
    accepted = []
    began = time.perf_counter()
    drafter.start([*prompt_ids, first_id], reader.aux())
    while len(token_ids) < max_new_tokens and token_ids[-1] not in eos_ids:
        tree = drafter.propose()
        verified = reader.verify(token_ids[-1], tree)
        new_ids = _up_to_end(verified.token_ids, eos_ids)
        is_ended = new_ids[-1] in eos_ids
        proposed.append(min(tree.depth, len(new_ids)) if is_ended else tree.depth)
        accepted.append(min(verified.num_accepted, len(new_ids)))
        token_ids += new_ids
        if len(token_ids) < max_new_tokens and not is_ended:
            drafter.extend(new_ids, reader.aux()[: len(new_ids)])
    seconds = time.perf_counter() - began
    return Generation(token_ids[:max_new_tokens], len(accepted), proposed, accepted, seconds)


def check_request(prompt_ids: list[int], max_new_tokens: int) -> None:
    """Raise ValueError if the prompt is empty or `max_new_tokens` is less than 1."""
    if not prompt_ids:
        raise ValueError("the prompt has no tokens; expected at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")


def _up_to_end(token_ids: list[int], eos_ids: Collection[int]) -> list[int]:
    end = next((i for i, token_id in enumerate(token_ids) if token_id in eos_ids), len(token_ids))
    return token_ids[: end + 1]
