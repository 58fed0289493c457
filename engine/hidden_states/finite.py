"""Detection and exclusion of documents with NaN or infinite hidden states, without host syncs.

A target that overflows, or that has a bad row in its embedding, gives such states for some
documents. One of them would make the loss and every weight of the draft NaN. The states are set to
zero before they enter any product, since 0 * NaN is NaN.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.batch import MicroBatch, PackedBatch, StateFaults, TargetOutput, documents_of

INFINITY = float("inf")
MAX_NAMED = 20  # documents that a rank names in its log
MIN_SEEN = 32  # documents before MAX_SHARE applies
MAX_SHARE = 0.5  # share of left-out documents above which the target must be broken


class NonFiniteError(ValueError):
    """Error for NaN or infinity that stops training; the message names the step or the document."""


def check_share(num_left_out: int, num_documents: int, when: str = "") -> None:
    """Raise NonFiniteError if the share of left-out documents shows that the target is broken.

    when: prefix of the message.
    """
    if num_documents >= MIN_SEEN and num_left_out > MAX_SHARE * num_documents:
        raise NonFiniteError(
            f"{when}{num_left_out} of {num_documents} documents so far have states that are not finite, so the target itself "
            "is broken. Check its checkpoint, and target.dtype: float16 overflows where the target was trained in bfloat16"
        )


def place_names(aux_layers: Sequence[int]) -> list[str]:
    """Return names for the columns of `StateFaults.by_place`, in the order of computation."""
    layers = [f"the output of layer {layer}" for layer in aux_layers]
    return ["the token embeddings", *layers, "the last hidden states"]


def fault_of(name: str, place: str) -> str:
    """Return the message for a document or prompt whose states are not finite.

    place: one of `place_names`.
    """
    return f"{name}: NaN or infinity, first in {place} of the target"


def find_faults(batch: PackedBatch, target: TargetOutput, embed_TD: Tensor | None) -> StateFaults:
    """Find the documents with states that are not finite.

    All tensors stay on the device of `target`; nothing is read to the host.
    embed_TD: [T, D] embeddings of the tokens; None if they are not used.
    """
    num_documents = batch.cu_seqlens.shape[0] - 1
    document_T = documents_of(batch.cu_seqlens, batch.num_tokens)
    aux_TAD = target.aux_TA.unflatten(1, (target.num_aux, -1))
    bad_TP = torch.zeros(batch.num_tokens, 1 + target.num_aux, dtype=torch.bool, device=document_T.device)
    bad_TP[:, 1:] = has_fault(aux_TAD)
    if embed_TD is not None:
        bad_TP[:, 0] = has_fault(embed_TD)
    bad_N = has_fault(target.last_hidden_ND)
    if target.lse_N is not None:
        bad_N |= ~target.lse_N.isfinite()

    counts = torch.zeros(num_documents, 2 + target.num_aux, dtype=torch.int32, device=document_T.device)
    counts[:, :-1].index_add_(0, document_T, bad_TP.int())
    counts[:, -1].index_add_(0, document_T[target.slots_N], bad_N.int())
    by_place = counts > 0
    return StateFaults(by_place, by_place.any(1)[document_T])


def has_fault(states: Tensor) -> Tensor:
    """Return whether each row along the last dimension holds NaN or infinity; copies no states."""
    return ~torch.linalg.vector_norm(states, ord=INFINITY, dim=-1).isfinite()


def cleaned(target: TargetOutput, faults: StateFaults) -> TargetOutput:
    """Set all outputs of a target to zero for documents with faults; changes `aux_TA` in place."""
    left_out_N = faults.left_out_T[target.slots_N]
    return replace(
        target,
        aux_TA=target.aux_TA.masked_fill_(faults.left_out_T[:, None], 0),
        last_hidden_ND=target.last_hidden_ND.masked_fill(left_out_N[:, None], 0),
        argmax_N=None if target.argmax_N is None else target.argmax_N.masked_fill(left_out_N, 0),
        lse_N=None if target.lse_N is None else target.lse_N.masked_fill(left_out_N, 0),
    )


def without_faulty_documents(micro: MicroBatch) -> MicroBatch:
    """Return a micro-batch in which documents with states that are not finite have no effect.

    Their rows carry no loss and count in no metric and no normaliser, and everything that is
    computed from them is zero. The results for other documents are as if these were absent.
    """
    faults = find_faults(micro.batch, micro.target, micro.embed_TD)
    return replace(
        micro,
        target=cleaned(micro.target, faults),
        embed_TD=micro.embed_TD.masked_fill(faults.left_out_T[:, None], 0),
        allowed_ST=micro.allowed_ST & ~faults.left_out_T,
        faults=faults,
    )
