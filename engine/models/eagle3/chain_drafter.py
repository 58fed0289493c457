"""Drafting with an EAGLE-3 draft: a chain of tokens, each drafted from the one before it.

`ChainDrafter` drafts while the target decodes. `propose_along` drafts from every token of finished
replies at once, in as many steps as there are proposed tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import nn

from engine.batch import MicroBatch, how_many_fit
from engine.models.draft_method import ServedDraft
from engine.models.drafter import TargetReply
from engine.models.eagle3.draft import Eagle3Draft, LayerKeys
from engine.models.eagle3.unroll import unroll
from engine.models.vocab_map import VocabMap

_ROWS_PER_STEP = 512


@dataclass(frozen=True)
class ServedEagle3(ServedDraft):
    """An EAGLE-3 draft ready to propose tokens: model, vocabulary map and embedding table.

    embed_weight_VD: [V, D], in the draft's width; the target's table if the widths agree.
    """

    model: Eagle3Draft
    vocab_map: VocabMap
    embed_weight_VD: torch.Tensor

    def to(self, dtype: torch.dtype) -> "ServedEagle3":
        """Return a copy that computes in `dtype`."""
        return ServedEagle3(copy.deepcopy(self.model).to(dtype), self.vocab_map, self.embed_weight_VD.to(dtype))

    def embed(self, token_ids_Q: torch.Tensor) -> torch.Tensor:
        """Look up embeddings [Q, D] of target token ids, int64 [Q]."""
        return nn.functional.embedding(token_ids_Q, self.embed_weight_VD)

    @torch.no_grad()
    def propose_id(self, output_QD: torch.Tensor) -> torch.Tensor:
        """Return the most likely target token ids, int64 [Q], given pre-norm outputs [Q, D]."""
        return self.vocab_map.target_ids_U[self.model.logits(output_QD).argmax(-1)]

    def drafter(self) -> "ChainDrafter":
        """Return a new drafter for one prompt."""
        return ChainDrafter(self)

    def propose_along(self, replies: Sequence[TargetReply], draft_tokens: int, max_tokens: int) -> list["ProposalsAlong"]:
        """Return one drafter per reply, which drafts from all of its tokens at once."""
        return propose_along(self, replies, draft_tokens, max_tokens)

    @torch.no_grad()
    def logits(self, micro: MicroBatch) -> torch.Tensor:
        """Compute the logits of every row, [S, T, U], from the draft's own embedding table."""
        embedded = replace(micro, embed_TD=self.embed(micro.batch.input_ids_T))
        outputs = unroll(self.model, embedded, steps=micro.allowed_ST.shape[0])
        return torch.stack([self.model.logits(output_TD) for output_TD in outputs])


class PrefixKeys:
    """Step-0 keys and values of one layer over the committed positions.

    The buffers double their size when they are full.
    """

    def __init__(self) -> None:
        self.length = 0
        self._key_TGE = self._value_TGE = torch.empty(0)

    def extended(self, key_QGE: torch.Tensor, value_QGE: torch.Tensor) -> LayerKeys:
        """Append `Q` positions, each of which attends to itself and to all earlier ones."""
        first = self.length
        self.length = self.length + key_QGE.shape[0]
        self._key_TGE = _write(self._key_TGE, key_QGE, first)
        self._value_TGE = _write(self._value_TGE, value_QGE, first)
        return self.seen_from(torch.arange(first, self.length, device=key_QGE.device))

    def seen_from(self, position_Q: torch.Tensor) -> LayerKeys:
        """Return the prefix as seen by rows at `position_Q`.

        Ancestor keys that are added to the returned object are not added to the prefix.
        """
        cu_seqlens = torch.tensor([0, self.length], device=position_Q.device)
        return LayerKeys(position_Q, cu_seqlens, self._key_TGE[: self.length], self._value_TGE[: self.length])


def _write(buffer_TGE: torch.Tensor, rows_QGE: torch.Tensor, first: int) -> torch.Tensor:
    """Write `rows_QGE` into `buffer_TGE` from position `first` on.

    Returns the same buffer if the rows fit, otherwise a larger copy.
    """
    end = first + rows_QGE.shape[0]
    if end > buffer_TGE.shape[0]:
        larger_TGE = rows_QGE.new_empty(2 * end, *rows_QGE.shape[1:])
        if first:
            larger_TGE[:first] = buffer_TGE[:first]
        buffer_TGE = larger_TGE
    buffer_TGE[first:end] = rows_QGE
    return buffer_TGE


class ChainDrafter:
    """Drafter that runs an EAGLE-3 draft and drafts each token from the previous one."""

    def __init__(self, draft: ServedEagle3) -> None:
        self.draft = draft

    def start(self, token_ids: list[int], aux_TA: torch.Tensor) -> None:
        self.prefix = [PrefixKeys() for _ in self.draft.model.decoder_layers]
        self.extend(token_ids[1:], aux_TA)

    @torch.inference_mode()
    def extend(self, token_ids: list[int], aux_QA: torch.Tensor) -> None:
        model = self.draft.model
        embed_weight_VD = self.draft.embed_weight_VD
        token_Q = torch.tensor(token_ids, device=embed_weight_VD.device)
        aux_QA = aux_QA.to(embed_weight_VD)
        for rows_token_Q, rows_aux_QA in zip(token_Q.split(_ROWS_PER_STEP), aux_QA.split(_ROWS_PER_STEP), strict=True):
            first = self.prefix[0].length
            position_Q = torch.arange(first, first + rows_token_Q.shape[0], device=token_Q.device)
            output_QD, _ = model.step(self.draft.embed(rows_token_Q), model.fuse(rows_aux_QA), position_Q, self.prefix)
        self.position_1 = position_Q[-1:]
        self.output_1D = output_QD[-1:]

    @torch.inference_mode()
    def propose(self, count: int) -> list[int]:
        model = self.draft.model
        output_1D = self.output_1D
        keys = [prefix.seen_from(self.position_1) for prefix in self.prefix]
        drafted = [self.draft.propose_id(output_1D)]
        for step in range(1, count):
            embed_1D = self.draft.embed(drafted[-1])
            output_1D, keys = model.step(embed_1D, model.next_state(output_1D), self.position_1 + step, keys)
            drafted.append(self.draft.propose_id(output_1D))
        return torch.cat(drafted).tolist()


@torch.inference_mode()
def propose_along(
    draft: ServedEagle3, replies: Sequence[TargetReply], draft_tokens: int, max_tokens: int
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
        together = waiting[: how_many_fit(lengths, max_tokens)]
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


def _draft_from_all(draft: ServedEagle3, replies: Sequence[TargetReply], draft_tokens: int) -> torch.Tensor:
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
