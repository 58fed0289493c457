"""Greedy replies of a target to many prompts at once, and the replay of drafters on them.

Speculative decoding emits the target's greedy reply with any drafter; the drafter only changes the
number of forwards. The target therefore decodes its reply to each prompt once. Each drafter is then
replayed on that reply with the target's states, as in decoding with a cache, without further target
forwards. An EAGLE-3 draft does not have to run one token at a time: `propose_along` drafts from
every token of every reply at once, in as many steps as there are proposed tokens.

`batched_replies` decodes with a cache and requires a target that is not sharded. `greedy_replies`
works without a cache, for a sharded target or one whose cache cannot be rolled back: each forward
reads all prompts and replies again, packed as in training.
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

PAD_ID = 0  # Any token works, because no other position attends to padding.


@dataclass(frozen=True)
class TargetReply:
    """The target's greedy reply to one prompt.

    prompt_ids: token ids of the prompt. token_ids: the reply's, as `greedy_decode` returns them.
    aux_TA: [T, 3D] on the host, auxiliary states of all their tokens except the last one.
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
    """Decode the reply to each prompt greedily without a cache.

    A collective of the ranks that share the target. Each rank passes its own prompts, or none.
    max_tokens: limit of tokens in a forward, unless a single prompt and its reply are longer.
    on_forward: called with the number of tokens generated so far.
    Raises ValueError as `greedy_decode` does.
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
    The tokens equal those of `greedy_decode` as long as the target's argmax does not depend on the
    number of prompts in a forward.
    on_forward: called with the number of tokens generated so far.
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
def propose_along(
    draft: ServedDraft, replies: Sequence[TargetReply], draft_tokens: int, max_tokens: int
) -> list["ProposalsAlong"]:
    """Return one drafter per reply, with precomputed proposals that equal those of `ChainDrafter`.

    The draft runs from all tokens of several replies at once.
    max_tokens: largest number of tokens in a draft forward, unless a single reply is longer.
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
    """Return the tokens that the draft's step-0 rows read.

    These are all tokens except the first, which no row reads, and the last, which ends the reply.
    """
    return (reply.prompt_ids + reply.token_ids)[1:-1]


def _draft_from_all(draft: ServedDraft, replies: Sequence[TargetReply], draft_tokens: int) -> torch.Tensor:
    """Return the proposals after every reply token, int64 [Q, draft_tokens].

    The last token of each reply has no proposals.
    """
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
    # Layers below the last run step 0 for every token: the next layer reads all outputs.
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
    """Drafter that returns proposals computed in advance for every token of one reply."""

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
    """Return the result of `speculative_decode`, computed from the target's reply, without timing.

    `reply` must have been decoded with the same `max_new_tokens` and `eos_ids`.
    """
    whole = len(reply.token_ids) == max_new_tokens or reply.token_ids[-1] in eos_ids
    assert whole, f"a reply of {len(reply.token_ids)} tokens was decoded with other limits than {max_new_tokens}"
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
    """`Reader` that repeats a finished reply without running the target."""

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
    """Return how many of the first documents fit into one forward, at least 1."""
    return max(1, sum(total <= max_tokens for total in accumulate(lengths)))


def _read_together(target: FrozenTarget, documents: Sequence[list[int]]) -> tuple[TargetOutput, list[int]]:
    """Run a forward over whole documents; return its output and the target's choice after each."""
    batch = packed(documents)
    output = target(batch, batch.cu_seqlens[1:].long() - 1)
    return output, output.argmax_N.tolist()


def packed(documents: Sequence[list[int]]) -> PackedBatch:
    """Return a packed batch of the documents, without any assistant tokens."""
    ids_T = torch.tensor([token_id for document in documents for token_id in document])
    cu_seqlens = torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32)
    return PackedBatch(ids_T, torch.zeros_like(ids_T, dtype=torch.bool), cu_seqlens)
