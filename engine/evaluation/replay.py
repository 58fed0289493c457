"""Greedy replies of a target to many prompts at once, and the replay of drafters on them.

Speculative decoding emits the target's greedy reply with any drafter; the drafter only changes the
number of forwards. The target therefore decodes its reply to each prompt once. Each drafter is then
replayed on that reply with the target's states, as in decoding with a cache, without further target
forwards. A draft does not have to run one token at a time: see `ServedDraft.propose_along`.

`batched_replies` decodes with a cache and requires a target that is not sharded. `greedy_replies`
works without a cache, for a sharded target or one whose cache cannot be rolled back: each forward
reads all prompts and replies again, packed as in training.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from transformers import DynamicCache

from engine.batch import PackedBatch, TargetOutput, how_many_fit
from engine.evaluation.decoding import Generation, Verified, check_request, speculate
from engine.models.drafter import Drafter, TargetReply, TokenTree
from engine.target.frozen import ForwardCapture, FrozenTarget, capture

PAD_ID = 0  # Any token works, because no other position attends to padding.


def greedy_replies(
    target: FrozenTarget,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    max_tokens: int,
    on_forward: Callable[[int], None] = lambda num_tokens: None,
) -> list[TargetReply]:
    """Decode the reply to each prompt greedily without a cache.

    A collective of the ranks that share the target. Each rank passes its own prompts, or none.
    max_tokens: limit of tokens in a forward, unless a single prompt and its reply are longer.
    on_forward: called with the number of tokens generated so far.
    Raises ValueError as `plain_decode` does.
    """
    for prompt_ids in prompts:
        check_request(prompt_ids, max_new_tokens)
    reply_ids: list[list[int]] = [[] for _ in prompts]
    aux: dict[int, torch.Tensor] = {}
    unfinished = list(range(len(prompts)))
    while unfinished:
        lengths = [len(prompts[index]) + len(reply_ids[index]) for index in unfinished]
        together = unfinished[: how_many_fit(lengths, max_tokens)]
        output, choices = _read_together(target, [prompts[index] + reply_ids[index] for index in together])
        for index, choice, aux_TA in zip(together, choices, output.aux_TA.split(lengths[: len(together)]), strict=True):
            reply_ids[index].append(choice)
            if choice in eos_ids or len(reply_ids[index]) == max_new_tokens:
                aux[index] = aux_TA.to("cpu", copy=True)
                unfinished.remove(index)
        on_forward(sum(map(len, reply_ids)))
    target.join_other_forwards()
    return [TargetReply(prompt_ids, reply_ids[index], aux[index]) for index, prompt_ids in enumerate(prompts)]


@torch.inference_mode()
def batched_replies(
    target: FrozenTarget,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    batch_size: int,
    on_forward: Callable[[int], None] = lambda num_tokens: None,
) -> list[TargetReply]:
    """Decode the replies to all prompts greedily with a cache, `batch_size` prompts at a time.

    Prompts of similar length share a batch and are padded on the left. Each forward decodes one
    token per unfinished prompt, and a prompt leaves the batch when its reply ends. The target must
    not be sharded, and its layers must ignore padding, as attention does.
    The tokens equal those of `plain_decode` as long as the target's argmax does not depend on the
    number of prompts in a forward.
    on_forward: called with the number of tokens generated so far.
    Raises ValueError as `plain_decode` does.
    """
    for prompt_ids in prompts:
        check_request(prompt_ids, max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: dict[int, TargetReply] = {}
    num_tokens = 0
    for first in range(0, len(by_length), batch_size):
        chosen = by_length[first : first + batch_size]
        with capture(target.model, target.aux_layers) as seen:
            batch = _DecodedBatch(target, seen, [prompts[index] for index in chosen])
            while batch.unfinished:
                batch.decode_one_token(max_new_tokens, eos_ids)
                on_forward(num_tokens + batch.num_tokens)
        num_tokens += batch.num_tokens
        for index, reply in zip(chosen, batch.replies(), strict=True):
            replies[index] = reply
    return [replies[index] for index in range(len(prompts))]


class _DecodedBatch:
    """Prompts that are decoded together and share one cache.

    unfinished: indices of the unfinished prompts, in the order of the cache's rows.
    num_tokens: number of tokens generated so far, over all prompts.
    """

    def __init__(self, target: FrozenTarget, seen: ForwardCapture, prompts: list[list[int]]) -> None:
        self._target = target
        self._seen = seen
        self._prompts = prompts
        self._generated: list[list[int]] = [[] for _ in prompts]
        self._aux: list[list[torch.Tensor]] = [[] for _ in prompts]
        self._cache = DynamicCache(config=target.model.config)
        self._takes_positions = "position_ids" in inspect.signature(target.decoder.forward).parameters
        self.unfinished = list(range(len(prompts)))
        self.num_tokens = 0
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        padded = [[PAD_ID] * count + prompt for count, prompt in zip(padding, prompts, strict=True)]
        self._input_ids_BL = torch.tensor(padded, device=target.device)
        padding_B1 = torch.tensor(padding, device=target.device)[:, None]
        self._is_token_BK = (torch.arange(longest, device=target.device) >= padding_B1).long()

    def decode_one_token(self, max_new_tokens: int, eos_ids: Collection[int]) -> None:
        """Run one forward, which adds one token to every unfinished prompt."""
        argmax_B = self._read()
        aux_BLA = self._seen.aux()
        token_ids = argmax_B.tolist()
        stays = []
        for row, index in enumerate(self.unfinished):
            # The first forward reads the padding and the prompt; later ones read one token.
            num_read = len(self._prompts[index]) if not self._generated[index] else 1
            self._aux[index].append(aux_BLA[row, -num_read:].to("cpu", copy=True))
            self._generated[index].append(token_ids[row])
            self.num_tokens += 1
            if token_ids[row] not in eos_ids and len(self._generated[index]) < max_new_tokens:
                stays.append(row)
        self._keep(stays, argmax_B)

    def _read(self) -> torch.Tensor:
        """Read the newest tokens and return the most likely next token of each row, int64 [B]."""
        positions = {}
        if self._takes_positions:
            position_BK = (self._is_token_BK.cumsum(1) - 1).clamp_min(0)
            positions["position_ids"] = position_BK[:, -self._input_ids_BL.shape[1] :]
        self._target.decoder(
            input_ids=self._input_ids_BL,
            attention_mask=self._is_token_BK,
            past_key_values=self._cache,
            use_cache=True,
            **positions,
        )
        return self._target.whole_head().logits(self._seen.last_hidden()[:, -1]).argmax(-1)

    def _keep(self, stays: list[int], argmax_B: torch.Tensor) -> None:
        """Drop all rows except `stays`. argmax_B: the token that each current row reads next."""
        if len(stays) < len(self.unfinished):
            self.unfinished = [self.unfinished[row] for row in stays]
            if not stays:
                return
            rows_b = torch.tensor(stays, device=argmax_B.device)
            self._cache.batch_select_indices(rows_b)
            self._is_token_BK = self._is_token_BK[rows_b]
            argmax_B = argmax_B[rows_b]
        self._input_ids_BL = argmax_B[:, None]
        self._is_token_BK = torch.nn.functional.pad(self._is_token_BK, (0, 1), value=1)

    def replies(self) -> list[TargetReply]:
        """Return the reply to each prompt, in the order of the prompts."""
        return [
            TargetReply(prompt_ids, token_ids, torch.cat(aux))
            for prompt_ids, token_ids, aux in zip(self._prompts, self._generated, self._aux, strict=True)
        ]


@torch.inference_mode()
def replay(
    reply: TargetReply, drafter: Drafter, *, max_new_tokens: int, num_steps: int, eos_ids: Collection[int]
) -> Generation:
    """Return the result of `speculative_decode`, computed from the target's reply, without timing.

    reply: decoded with the same `eos_ids` and at least `num_steps` tokens more, unless it ended. The last
    verification may accept tokens beyond `max_new_tokens`.
    num_steps: largest depth of the drafter's trees.
    """
    is_whole = len(reply.token_ids) >= max_new_tokens + num_steps or reply.token_ids[-1] in eos_ids
    assert is_whole, f"a reply of {len(reply.token_ids)} tokens is too short for {max_new_tokens} and {num_steps} more"
    generation = speculate(
        _Replay(reply),
        drafter,
        reply.prompt_ids,
        reply.token_ids[0],
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
    )
    return replace(generation, seconds=0.0)


class _Replay:
    """`Reader` that repeats a finished reply without running the target."""

    def __init__(self, reply: TargetReply) -> None:
        self._reply = reply
        self._first = 0
        self._end = len(reply.prompt_ids)  # of the tokens that have been read

    def verify(self, newest_id: int, tree: TokenTree) -> Verified:
        start = self._end + 1 - len(self._reply.prompt_ids)  # in the reply, of what follows the newest token
        following = iter(self._reply.token_ids[start:])
        num_accepted = len(tree.accepted(lambda node: next(following, None)))
        self._first = self._end
        self._end += 1 + num_accepted
        return Verified(self._reply.token_ids[start : start + num_accepted + 1], num_accepted)

    def aux(self) -> torch.Tensor:
        return self._reply.aux_TA[self._first : self._end]


def _read_together(target: FrozenTarget, documents: Sequence[list[int]]) -> tuple[TargetOutput, list[int]]:
    """Run a forward over whole documents; return its output and the target's choice after each."""
    batch = packed(documents)
    output = target(batch, batch.cu_seqlens[1:].long() - 1)
    argmax_N, _ = output.head_stats
    return output, argmax_N.tolist()


def packed(documents: Sequence[list[int]]) -> PackedBatch:
    """Return a packed batch of the documents, without any assistant tokens."""
    ids_T = torch.tensor([token_id for document in documents for token_id in document])
    cu_seqlens = torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32)
    return PackedBatch(ids_T, torch.zeros_like(ids_T, dtype=torch.bool), cu_seqlens)
