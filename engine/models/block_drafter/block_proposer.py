"""Drafting with a block drafter: while the target decodes one prompt, or from every token of finished replies.

The draft keeps keys and values of the context in every layer. A token's context is added once the
target has read it, and never changes. A block starts at the newest committed token, whose target
states do not exist yet.

Shapes: C context tokens, B rows of a block, S tokens that a block drafts, N blocks, D hidden size.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.batch import PackedBatch, how_many_fit
from engine.config.tree_shape import TreeShape
from engine.kernels import BlockRows
from engine.kernels.elementwise import rotate
from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_rows import BlockPlan, is_causal_layer, plan_anchors
from engine.models.block_drafter.draft_choice import DrawnTokens
from engine.models.drafter import DraftSampling, TargetReply, TokenTree

if TYPE_CHECKING:
    from engine.models.block_drafter.served_block import ServedBlock

ROWS_PER_FORWARD = 512  # of a prompt
FIRST_CAPACITY = 512  # tokens of a new cache; it doubles when it is full


class ContextCache:
    """Keys and values of one layer's context, [G, C, E] each; keys have rotary embedding."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key_CGE: Tensor, value_CGE: Tensor) -> None:
        """Add the keys and values of further tokens."""
        end = self.length + len(key_CGE)
        if self._keys is None or self._values is None or end > self._keys.shape[1]:
            capacity = max(FIRST_CAPACITY, 2 * end)
            self._keys = self._grown(self._keys, key_CGE, capacity)
            self._values = self._grown(self._values, value_CGE, capacity)
        self._keys[:, self.length : end] = key_CGE.transpose(0, 1)
        self._values[:, self.length : end] = value_CGE.transpose(0, 1)
        self.length = end

    def _grown(self, held_GCE: Tensor | None, like_CGE: Tensor, capacity: int) -> Tensor:
        new_GCE = like_CGE.new_empty(like_CGE.shape[1], capacity, like_CGE.shape[2])
        if held_GCE is not None:
            new_GCE[:, : self.length] = held_GCE[:, : self.length]
        return new_GCE

    def followed_by(self, key_BGE: Tensor, value_BGE: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the context and of a block's rows, [G, C + B, E]; the block is not kept."""
        end = self.length + len(key_BGE)
        length = self.length
        self.append(key_BGE, value_BGE)
        self.length = length
        assert self._keys is not None, "append allocates them"
        assert self._values is not None, "append allocates them"
        return self._keys[:, :end], self._values[:, :end]


class BlockProposer:
    """Drafter that proposes the tokens of one block after the newest committed token."""

    def __init__(self, draft: "ServedBlock", shape: TreeShape, sampling: DraftSampling | None = None) -> None:
        """Create a drafter. sampling: how it draws tokens; None = it takes the most likely ones."""
        self._draft = draft
        self._sampling = sampling
        if sampling is not None:
            self._generator = torch.Generator(draft.embed_weight_VD.device).manual_seed(sampling.seed)
        self._num_tokens = shape.num_steps
        self._caches: list[ContextCache] = []
        self._newest_id = 0

    def start(self, token_ids: list[int], aux_TA: Tensor) -> None:
        self._caches = [ContextCache() for _ in self._draft.model.layers]
        self.extend(token_ids[1:], aux_TA)

    @torch.inference_mode()
    def extend(self, token_ids: list[int], aux_QA: Tensor) -> None:
        model = self._draft.model
        self._newest_id = token_ids[-1]
        for rows_aux_QA in aux_QA.to(self._draft.embed_weight_VD).split(ROWS_PER_FORWARD):
            context_QD = model.context(rows_aux_QA)
            first = self._caches[0].length
            position_Q = torch.arange(first, first + len(rows_aux_QA), device=context_QD.device)
            cos_sin = model.rotary.cos_sin(position_Q, context_QD.dtype)
            for layer, held in zip(model.decoder_layers, self._caches, strict=True):
                keys = model.context_keys(layer, context_QD, cos_sin)
                held.append(keys.key_CGE, keys.value_CGE)

    @torch.inference_mode()
    def propose(self) -> TokenTree:
        draft = self._draft
        newest_1 = torch.tensor([self._newest_id], device=draft.embed_weight_VD.device)
        hidden_BD = block_states(draft.model, draft.embed_weight_VD[newest_1], self._caches)
        first = draft.first_drafting_row
        hidden_1SD = hidden_BD[None, first : first + self._num_tokens]
        if self._sampling is None:
            return TokenTree.chain(draft.choose(hidden_1SD, newest_1)[0])
        draws = DrawnTokens(self._sampling.temperature, self._generator)
        (token_ids,) = draft.choose(hidden_1SD, newest_1, draws)
        return TokenTree.chain(token_ids, draws.of_one_block(len(token_ids)))


def block_states(model: BlockDraft, anchor_embed_1D: Tensor, caches: Sequence[ContextCache]) -> Tensor:
    """Compute the final states of one block after a context, [B, D]."""
    plan = _one_block(model.config.block_size, anchor_embed_1D.device)
    num_context = caches[0].length
    position_B = plan.offset_P + num_context
    cos_sin = model.rotary.cos_sin(position_B, anchor_embed_1D.dtype)
    state_BD = anchor_embed_1D
    for index, (layer, held) in enumerate(zip(model.decoder_layers, caches, strict=True)):
        inputs = model.inputs(layer, state_BD, plan) if index else model.first_inputs(layer, state_BD, plan)
        key_GKE, value_GKE = held.followed_by(rotate(inputs.key_PGE, cos_sin), inputs.value_PGE)
        attended_BHE = torch.nn.functional.scaled_dot_product_attention(
            rotate(inputs.query_QHE, cos_sin).transpose(0, 1)[None],
            key_GKE[None],
            value_GKE[None],
            attn_mask=_mask(model, index, num_context, position_B),
            enable_gqa=True,
        )[0].transpose(0, 1)
        attended_BD = layer.self_attn.o_proj(attended_BHE.flatten(-2))
        state_BD = inputs.state_QD + model.after_attention(layer, inputs, attended_BD, plan.offset_P)
        state_BD = state_BD + model.mlp_output(layer, state_BD, plan.offset_P)
    return model.norm(state_BD)


def _mask(model: BlockDraft, index: int, num_context: int, position_B: Tensor) -> Tensor | None:
    """Return which keys each row of a block sees in a layer, bool [B, C + B]; None = all."""
    config = model.config
    window = config.windows[index]
    is_causal = is_causal_layer(config.is_causal, window)
    if window is None and not is_causal:
        return None
    key_K = torch.arange(num_context + len(position_B), device=position_B.device)
    distance_BK = position_B[:, None] - key_K
    sees_BK = torch.ones_like(distance_BK, dtype=torch.bool)
    if is_causal:
        sees_BK &= distance_BK >= 0
    if window is not None:
        is_limited_K = (key_K < num_context) | is_causal
        sees_BK &= (distance_BK < window) | ~is_limited_K
    return sees_BK


@cache
def _one_block(block_size: int, device: torch.device) -> BlockPlan:
    """Return the plan of a single block, as far as the layers read it."""
    row_B = torch.arange(block_size, device=device)
    zero_1 = torch.zeros(1, dtype=torch.long, device=device)
    nothing = BlockRows(row_B, row_B, row_B, row_B)
    return BlockPlan(
        context_C=None,
        context_position_C=zero_1[:0],
        anchor_N=zero_1,
        first_row_N=zero_1,
        block_P=torch.zeros_like(row_B),
        offset_P=row_B,
        position_P=row_B,
        layers=(nothing,),
        loss_row_R=row_B,
        prediction_R=row_B,
        slot_R=row_B,
    )


class BlocksAlong:
    """Drafter that returns chains that were drafted in advance from every token of one reply."""

    def __init__(self, chains: Sequence[Sequence[int]]) -> None:
        self._chains = chains
        self._newest = 0

    def start(self, token_ids: list[int], aux_TA: Tensor) -> None:
        self._newest = 0

    def extend(self, token_ids: list[int], aux_QA: Tensor) -> None:
        self._newest += len(token_ids)

    def propose(self) -> TokenTree:
        return TokenTree.chain(self._chains[self._newest])


@torch.inference_mode()
def propose_along(draft: "ServedBlock", replies: Sequence[TargetReply], num_tokens: int, max_tokens: int) -> list[BlocksAlong]:
    """Return one drafter per reply, with precomputed proposals that equal those of `BlockProposer`.

    num_tokens: tokens drafted per block.
    max_tokens: largest number of tokens, or rows of blocks, in a forward, unless a single reply has more.
    """
    chains: list[list[list[int]]] = [[] for _ in replies]
    block_size = draft.model.config.block_size
    # A reply of one token ends before anything is drafted.
    waiting = [index for index, reply in enumerate(replies) if len(reply.token_ids) > 1]
    while waiting:
        costs = [_num_rows(replies[index], block_size) for index in waiting]
        together = waiting[: how_many_fit(costs, max_tokens)]
        waiting = waiting[len(together) :]
        drafted = _draft_from_all(draft, [replies[index] for index in together], num_tokens)
        for index in together:
            count = len(replies[index].token_ids) - 1
            chains[index] = drafted[:count]
            drafted = drafted[count:]
    return [BlocksAlong(own) for own in chains]


def _num_rows(reply: TargetReply, block_size: int) -> int:
    """Return the larger number of a reply's tokens and of the rows of its blocks."""
    return max(len(reply.prompt_ids) + len(reply.token_ids), block_size * len(reply.token_ids))


def _draft_from_all(draft: "ServedBlock", replies: Sequence[TargetReply], num_tokens: int) -> list[list[int]]:
    """Return the chains that are drafted after every token of the replies except the last of each."""
    model = draft.model
    device = draft.embed_weight_VD.device
    documents = [[*reply.prompt_ids, *reply.token_ids[:-1]] for reply in replies]
    starts = [0, *accumulate(map(len, documents))]
    token_T = torch.tensor([token_id for document in documents for token_id in document], device=device)
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    batch = PackedBatch(token_T, torch.ones_like(token_T, dtype=torch.bool), cu_seqlens)
    anchors = [
        torch.arange(start + len(reply.prompt_ids), start + len(document))
        for start, document, reply in zip(starts, documents, replies, strict=False)
    ]
    anchor_N = torch.cat(anchors).to(device)
    learns_NS = torch.zeros(len(anchor_N), model.config.num_predictions, dtype=torch.bool, device=device)
    learns_NS[:, :num_tokens] = True
    plan = plan_anchors(batch, anchor_N, learns_NS, draft.block_shape)
    # The target's states of a reply's last tokens exist too, but no block sees them.
    aux_TA = torch.cat([reply.aux_TA[: len(document)] for reply, document in zip(replies, documents, strict=True)])
    aux_TA = aux_TA.to(draft.embed_weight_VD)
    newest_N = token_T[anchor_N]
    hidden_RD = model.hidden_rows(aux_TA, draft.embed_weight_VD[newest_N], plan)
    hidden_NSD = hidden_RD.unflatten(0, (len(anchor_N), num_tokens))
    return draft.choose(hidden_NSD, newest_N)
