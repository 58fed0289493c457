"""Logits of some blocks of a batch, with which two copies of a draft are compared."""

import torch
from torch import Tensor

from engine.batch import MicroBatch
from engine.kernels.interface import FrozenHead
from engine.kernels.reference import upcast
from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_rows import BlockShape, plan_anchors

NUM_BLOCKS = 32


def shape_of(model: BlockDraft) -> BlockShape:
    """Return what a plan needs to know of a draft, as a server runs it."""
    config = model.config
    shift = 1 if config.num_predictions == config.block_size else 0
    return BlockShape(config.block_size, shift, config.windows, config.is_causal)


def head_logits(head: FrozenHead, hidden_QD: Tensor) -> Tensor:
    """Return the logits of rows, fp32 [..., V]."""
    products_QV = torch.nn.functional.linear(hidden_QD.to(head.weight_VD.dtype), head.weight_VD)
    return head.transform(upcast(products_QV))


def probe_logits(draft: BlockDraft, head: FrozenHead, micro: MicroBatch, embed_TD: Tensor) -> Tensor:
    """Compute the logits of up to `NUM_BLOCKS` blocks spread over a batch, with the changes by the draft's heads.

    embed_TD: the target's embeddings of the batch's tokens. Returns fp32 [S, N, V].
    """
    ids_T = micro.batch.input_ids_T
    num_tokens = micro.batch.num_tokens
    num_predictions = draft.config.num_predictions
    count = max(1, min(NUM_BLOCKS, num_tokens - 1))
    anchor_N = torch.arange(1, count + 1, device=ids_T.device) * (num_tokens - 1) // count
    learns_NS = torch.ones(count, num_predictions, dtype=torch.bool, device=ids_T.device)
    plan = plan_anchors(micro.batch, anchor_N, learns_NS, shape_of(draft))
    hidden_RD = draft.hidden_rows(micro.target.aux_TA, embed_TD[anchor_N], plan)
    hidden_NSD = hidden_RD.unflatten(0, (count, num_predictions))
    previous_NS = anchor_N[:, None] + torch.arange(num_predictions, device=ids_T.device)
    previous_id_NS = ids_T[previous_NS.clamp_max(num_tokens - 1)]
    logits_NSV = draft.adjusted_logits(head_logits(head, hidden_NSD), hidden_NSD, previous_id_NS)
    return logits_NSV.transpose(0, 1)
