"""Drafting with an EAGLE-3 draft from every token of finished replies at once.

The draft reads the tokens of several replies in one forward pass, and then one level of all trees
per forward pass.

Shapes: T packed tokens, Q of them from which a tree grows, K nodes that are read per level and root,
R = Q * K rows of a level, A auxiliary width.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.batch import how_many_fit
from engine.config.tree_shape import TreeShape
from engine.models.drafter import TargetReply, TokenTree
from engine.models.eagle3.draft import LayerKeys
from engine.models.tree_growth import Candidates, TreeGrowth

if TYPE_CHECKING:
    from engine.models.eagle3.served_draft import ServedEagle3


class DraftsAlong:
    """Drafter that returns trees that were drafted in advance from every token of one reply.

    candidates: one root per token of the reply except the last. shape: which of them are proposed.
    """

    def __init__(self, candidates: Candidates | None, shape: TreeShape) -> None:
        self._candidates = candidates
        self._trees: list[TokenTree] = []
        if candidates is not None:
            self._trees = candidates.of_steps(shape).trees(shape.num_nodes)
        self._newest = 0

    def reshaped(self, shape: TreeShape) -> "DraftsAlong":
        """Return a drafter that proposes trees of another shape.

        shape: with the same `topk` and rule, and at most as many steps.
        """
        return DraftsAlong(self._candidates, shape)

    def start(self, token_ids: list[int], aux_TA: Tensor) -> None:
        self._newest = 0

    def extend(self, token_ids: list[int], aux_QA: Tensor) -> None:
        self._newest += len(token_ids)

    def propose(self) -> TokenTree:
        return self._trees[self._newest]


@torch.inference_mode()
def propose_along(
    draft: "ServedEagle3", replies: Sequence[TargetReply], shape: TreeShape, max_tokens: int
) -> list[DraftsAlong]:
    """Return one drafter per reply, with precomputed proposals that equal those of `TreeDrafter`.

    max_tokens: largest number of tokens in a draft forward, unless a single reply is longer.
    """
    candidates: list[Candidates | None] = [None for _ in replies]
    # A reply of one token ends before anything is drafted.
    waiting = [index for index, reply in enumerate(replies) if len(reply.token_ids) > 1]
    while waiting:
        lengths = [_num_rows(replies[index], shape.topk) for index in waiting]
        together = waiting[: how_many_fit(lengths, max_tokens)]
        waiting = waiting[len(together) :]
        chosen = [replies[index] for index in together]
        sizes = [len(reply.token_ids) - 1 for reply in chosen]
        drafted = _draft_from_all(draft, chosen, shape)
        parts = (drafted.token_QC.cpu(), drafted.score_QC.cpu(), drafted.parent_QC.cpu())
        for index, *own in zip(together, *(part.split(sizes) for part in parts), strict=True):
            candidates[index] = Candidates(*own)
    return [DraftsAlong(own, shape) for own in candidates]


def _num_rows(reply: TargetReply, topk: int) -> int:
    """Return the largest number of rows that the draft reads at once for a reply."""
    return max(len(_rows_read(reply)), topk * len(reply.token_ids))


def _rows_read(reply: TargetReply) -> list[int]:
    """Return the tokens that the draft's step-0 rows read.

    These are all tokens except the first, which no row reads, and the last, which ends the reply.
    """
    return (reply.prompt_ids + reply.token_ids)[1:-1]


def _draft_from_all(draft: "ServedEagle3", replies: Sequence[TargetReply], shape: TreeShape) -> Candidates:
    """Return what is drafted after every reply token except the last of each reply."""
    model = draft.model
    topk = shape.topk
    keys, position_Q, output_QD = _read_replies(draft, replies)
    growth = TreeGrowth(shape)
    growth.add(*_best_ids(draft, output_QD, topk))
    device = position_Q.device
    root_R = torch.arange(len(position_Q), device=device)[:, None].expand(-1, topk).flatten()
    position_R = position_Q[root_R]
    keys = [replace(layer_keys, position_Q=layer_keys.position_Q[root_R], is_tree=topk > 1) for layer_keys in keys]
    for step in range(1, shape.num_steps):
        token_QK, parent_QK = growth.next_rows()
        # After level 1, the rows of a root are consecutive.
        parent_R = root_R if step == 1 else root_R * topk + parent_QK.flatten()
        ancestors = tuple((row_QK.flatten() + root_R * topk) for row_QK in growth.ancestors)
        keys = [replace(layer_keys, ancestors=ancestors) for layer_keys in keys]
        state_RD = model.next_state(output_QD)[parent_R]
        output_QD, keys = model.step(draft.embed(token_QK.flatten()), state_RD, position_R + step, keys)
        growth.add(*_best_ids(draft, output_QD, topk))
    return growth.candidates()


def _best_ids(draft: "ServedEagle3", output_QD: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return what `TreeGrowth.add` takes. In a chain, all tokens are verified, so they all count as 1."""
    logits_QU = draft.model.logits(output_QD)
    if topk == 1:
        token_Q1 = draft.best_id(logits_QU)[:, None]
        return torch.ones(token_Q1.shape, device=token_Q1.device), token_Q1
    return draft.best_ids(logits_QU, topk)


def _read_replies(draft: "ServedEagle3", replies: Sequence[TargetReply]) -> tuple[list[LayerKeys], Tensor, Tensor]:
    """Read prompts and replies.

    Returns the keys of each layer, seen from the rows that draft, the positions of these rows in
    their documents, int64 [Q], and their pre-norm outputs, [Q, D].
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
    return keys, position_T[row_Q], output_QD
