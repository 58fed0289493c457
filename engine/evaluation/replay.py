"""Greedy replies of a target to many prompts together, and any drafter judged by them.

Speculative decoding emits the target's greedy reply whoever drafts: a drafter only changes how many
forwards that takes. So the target decodes its reply to each prompt once. A drafter is then
replayed on that reply with the target's own states, as in decoding with a cache, without another
forward of the target. An EAGLE-3 draft need not even be run one token at a time: `propose_along`
drafts behind all tokens of all replies at once, in as many steps as tokens are proposed.

`batched_replies` decodes with a cache, for a whole target. `greedy_replies` needs none, for a target
that ranks share or whose cache cannot roll back: each forward reads everything again, of all prompts
together, packed as in training.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from transformers import DynamicCache

from engine.batch import PackedBatch, TargetOutput
from engine.evaluation.decoding import Drafter, Generation, check_request, speculate
from engine.models.eagle3.draft import LayerKeys, ServedDraft
from engine.target.frozen import ForwardCapture, FrozenTarget, capture

PAD_ID = 0  # any token will do: no other position attends to it


@dataclass(frozen=True)
class TargetReply:
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
) -> list[TargetReply]:
    """The reply to each prompt; a collective of the ranks that share the target, which bring prompts of their own, or none.

    max_tokens: read by a forward at most, unless one prompt alone holds more. on_forward is called with the number of tokens
    generated so far. Raises ValueError as `greedy_decode` does.
    """
    for prompt_ids in prompts:
        check_request(prompt_ids, max_new_tokens)
    reply_ids: list[list[int]] = [[] for _ in prompts]
    aux: dict[int, torch.Tensor] = {}
    unfinished = list(range(len(prompts)))
    while unfinished:
        lengths = [len(prompts[index]) + len(reply_ids[index]) for index in unfinished]
        together = unfinished[: _how_many_fit(lengths, max_tokens)]
        output, choices = _read_together(target, [prompts[index] + reply_ids[index] for index in together])
        for index, choice, aux_TA in zip(together, choices, output.aux_TA.split(lengths[: len(together)]), strict=True):
            reply_ids[index].append(choice)
            if choice in eos_ids or len(reply_ids[index]) == max_new_tokens:
                aux[index] = aux_TA.to("cpu", copy=True)
                unfinished.remove(index)
        on_forward(sum(map(len, reply_ids)))
    target.rest()
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

    Prompts of like length share a batch, are padded on the left, and leave it when their reply ends; each forward decodes one
    token of every prompt that is left. The target must be whole and its layers must ignore padding, as attention does.
    on_forward is called with the number of tokens generated so far.
    Tokens are those of `greedy_decode` wherever the target's argmax does not depend on how many prompts share a forward.
    Raises ValueError as `greedy_decode` does.
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
    """Prompts that share one cache.

    unfinished: indices of the prompts that are left, in the order of the cache's rows. num_tokens: generated by all so far.
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
        """Run one forward; every prompt that is left gets one more token."""
        argmax_B = self._read()
        aux_BLA = self._seen.aux()
        token_ids = argmax_B.tolist()
        stays = []
        for row, index in enumerate(self.unfinished):
            # The first forward reads the whole prompt, behind its padding; later ones read one token.
            num_read = len(self._prompts[index]) if not self._generated[index] else 1
            self._aux[index].append(aux_BLA[row, -num_read:].to("cpu", copy=True))
            self._generated[index].append(token_ids[row])
            self.num_tokens += 1
            if token_ids[row] not in eos_ids and len(self._generated[index]) < max_new_tokens:
                stays.append(row)
        self._keep(stays, argmax_B)

    def _read(self) -> torch.Tensor:
        """Read the newest tokens; returns the most likely next token of each row, int64 [B]."""
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
        """Go on with these rows alone; argmax_B: the token that each row reads next."""
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
        """Return the reply to each prompt, in their order."""
        return [
            TargetReply(prompt_ids, token_ids, torch.cat(aux))
            for prompt_ids, token_ids, aux in zip(self._prompts, self._generated, self._aux, strict=True)
        ]


@torch.inference_mode()
def propose_along(
    draft: ServedDraft, replies: Sequence[TargetReply], draft_tokens: int, max_tokens: int
) -> list["ProposalsAlong"]:
    """Return a drafter per reply that proposes what `ChainDrafter` would, computed behind all tokens at once.

    max_tokens: of a forward at most, unless one reply alone holds more.
    """
    table: list[list[list[int]]] = [[] for _ in replies]
    # A reply of one token ends before anything is drafted.
    waiting = [index for index, reply in enumerate(replies) if len(reply.token_ids) > 1]
    while waiting:
        lengths = [len(_rows_read(replies[index])) for index in waiting]
        together = waiting[: _how_many_fit(lengths, max_tokens)]
        waiting = waiting[len(together) :]
        chosen = [replies[index] for index in together]
        sizes = [len(reply.token_ids) - 1 for reply in chosen]
        proposed_QK = _draft_from_all(draft, chosen, draft_tokens).cpu()
        for index, rows_RK in zip(together, proposed_QK.split(sizes), strict=True):
            table[index] = rows_RK.tolist()
    return [ProposalsAlong(rows) for rows in table]


def _rows_read(reply: TargetReply) -> list[int]:
    """Tokens that the draft's step-0 rows read: all but the first, which no row reads, and the last, which ends the reply."""
    return (reply.prompt_ids + reply.token_ids)[1:-1]


def _draft_from_all(draft: ServedDraft, replies: Sequence[TargetReply], draft_tokens: int) -> torch.Tensor:
    """Proposals behind every token of the replies but their last ones, int64 [Q, draft_tokens]."""
    model = draft.model
    device = draft.embed_weight_VD.device
    documents = [_rows_read(reply) for reply in replies]
    cu_seqlens = torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32)
    token_T = torch.tensor([token_id for document in documents for token_id in document])
    position_T = torch.cat([torch.arange(len(document)) for document in documents])
    # Row t reads token t + 1; the first row that drafts reads the reply's first token.
    drafts_T = torch.cat([torch.arange(len(ids)) >= len(r.prompt_ids) - 1 for ids, r in zip(documents, replies, strict=True)])
    row_Q = drafts_T.nonzero().flatten()
    aux_TA = torch.cat([reply.aux_TA[: len(ids)] for ids, reply in zip(documents, replies, strict=True)])
    token_T, position_T, row_Q, cu_seqlens = (x.to(device) for x in (token_T, position_T, row_Q, cu_seqlens))

    every_T = LayerKeys(torch.arange(len(token_T), device=device), cu_seqlens, is_dense=True)
    own_Q = replace(every_T, position_Q=row_Q, is_dense=False)
    # Layers below the last one run step 0 for every token: the next one needs all their outputs.
    keys = [every_T] * (len(model.decoder_layers) - 1) + [own_Q]
    state_TD = model.fuse(aux_TA.to(draft.embed_weight_VD))
    output_QD, keys = model.step(draft.embed(token_T), state_TD, position_T, keys, row_Q)
    keys = [replace(layer_keys, position_Q=row_Q, is_dense=False) for layer_keys in keys]
    proposed = [draft.propose_id(output_QD)]
    for step in range(1, draft_tokens):
        state_QD = model.next_state(output_QD)
        output_QD, keys = model.step(draft.embed(proposed[-1]), state_QD, position_T[row_Q] + step, keys)
        proposed.append(draft.propose_id(output_QD))
    return torch.stack(proposed, dim=1)


class ProposalsAlong:
    """A drafter that goes along one reply, with its proposals behind each of the reply's tokens known beforehand."""

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows
        self._newest = 0

    def start(self, token_ids: list[int], aux_TA: torch.Tensor) -> None:
        self._newest = 0

    def extend(self, token_ids: list[int], aux_QA: torch.Tensor) -> None:
        self._newest += len(token_ids)

    def propose(self, count: int) -> list[int]:
        return self._rows[self._newest][:count]


@torch.inference_mode()
def replay(
    reply: TargetReply, drafter: Drafter, *, max_new_tokens: int, draft_tokens: int, eos_ids: Collection[int]
) -> Generation:
    """What `speculative_decode` gives where `reply` was decoded under the same `max_new_tokens` and `eos_ids`; not timed."""
    whole = len(reply.token_ids) == max_new_tokens or reply.token_ids[-1] in eos_ids
    assert whole, f"a reply of {len(reply.token_ids)} tokens was decoded under other limits than {max_new_tokens}"
    generation = speculate(
        _Replay(reply),
        drafter,
        reply.prompt_ids,
        reply.token_ids[:1],
        max_new_tokens=max_new_tokens,
        draft_tokens=draft_tokens,
        eos_ids=eos_ids,
    )
    return replace(generation, seconds=0.0)


class _Replay:
    """A target that says `reply` again, as `speculate` asks it."""

    def __init__(self, reply: TargetReply) -> None:
        self._reply = reply
        self._first = 0
        self._end = len(reply.prompt_ids)

    def read(self, token_ids: list[int], num_choices: int) -> list[int]:
        self._first = self._end
        self._end = self._end + len(token_ids)
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
    batch = packed(documents)
    output = target(batch, batch.cu_seqlens[1:].long() - 1)
    return output, output.argmax_N.tolist()


def packed(documents: Sequence[list[int]]) -> PackedBatch:
    """Return documents of token ids end to end, none of which is the assistant's."""
    ids_T = torch.tensor([token_id for document in documents for token_id in document])
    cu_seqlens = torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32)
    return PackedBatch(ids_T, torch.zeros_like(ids_T, dtype=torch.bool), cu_seqlens)
