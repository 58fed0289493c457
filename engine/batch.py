"""Data passed between the stages of a run: packed batches, target outputs and draft outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to a GPU without blocking the host.

    Return the tensor itself if it is already on a GPU, or if `device` is not a GPU.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x


def documents_of(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the index of the document that each token belongs to, int64 [T].

    cu_seqlens: int32 [num_documents + 1], as in `PackedBatch`.
    """
    position_T = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), position_T, right=True) - 1


def how_many_fit(lengths: Sequence[int], max_tokens: int) -> int:
    """Return how many of the first documents fit into one forward, at least 1."""
    return max(1, sum(total <= max_tokens for total in accumulate(lengths)))


@dataclass(frozen=True)
class PackedBatch:
    """Documents concatenated into one sequence without padding.

    input_ids_T: int64 [T], token ids, not shifted.
    assistant_mask_T: bool [T], true for assistant tokens.
    cu_seqlens: int32 [num_documents + 1], start of each document, then T.
    document_ids: index of each document in the loaded dataset; a store looks up their hidden
        states by it.
    document_epochs: epoch in which each document is read, counted from 0; empty = all in the first.
    host_lengths: tokens per document. They are kept on the host, because reading them from a
        device would wait for all of its queued work.
    """

    input_ids_T: torch.Tensor
    assistant_mask_T: torch.Tensor
    cu_seqlens: torch.Tensor
    document_ids: tuple[int, ...] = ()
    document_epochs: tuple[int, ...] = ()
    host_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.host_lengths:
            object.__setattr__(self, "host_lengths", tuple(self.cu_seqlens.diff().tolist()))

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.shape[0]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens per document, int32 [num_documents]."""
        return self.cu_seqlens.diff()

    @property
    def position_T(self) -> torch.Tensor:
        """Position of each token within its document, int64 [T]."""
        starts_T = torch.repeat_interleave(self.cu_seqlens[:-1].long(), self.lengths.long(), output_size=self.num_tokens)
        return torch.arange(self.num_tokens, device=starts_T.device) - starts_T

    def to(self, device: torch.device) -> "PackedBatch":
        return replace(
            self,
            input_ids_T=to_device(self.input_ids_T, device),
            assistant_mask_T=to_device(self.assistant_mask_T, device),
            cu_seqlens=to_device(self.cu_seqlens, device),
        )


@dataclass(frozen=True)
class TargetOutput:
    """Outputs of a target forward that the draft learns from.

    aux_TA: [T, A * D], outputs of the A auxiliary layers, concatenated in ascending layer order.
    slots_N: int64 [N], positions u whose target distribution is learned, ascending.
    last_hidden_ND: [N, D], hidden state after the target's final norm at the slots.
    argmax_N: int32 [N], most likely token over the full vocabulary; None = was not asked for.
    lse_N: fp32 [N], log-sum-exp of the target's logits (after soft-cap, scale and temperature)
        over the full vocabulary; None = was not asked for.
    embed_TD: [T, D], token embeddings, if the target's forward had to exchange them between ranks;
        None = the caller looks them up in the target's embedding table.
    """

    aux_TA: torch.Tensor
    slots_N: torch.Tensor
    last_hidden_ND: torch.Tensor
    argmax_N: torch.Tensor | None
    lse_N: torch.Tensor | None
    embed_TD: torch.Tensor | None = None

    @property
    def head_stats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`argmax_N` and `lse_N`, which must have been asked for."""
        assert self.argmax_N is not None and self.lse_N is not None, "DraftMethod.needs_head_stats"
        return self.argmax_N, self.lse_N

    @property
    def num_aux(self) -> int:
        """Number A of auxiliary layers."""
        return self.aux_TA.shape[1] // self.last_hidden_ND.shape[1]


@dataclass(frozen=True)
class StateFaults:
    """Documents of a packed batch whose hidden states are NaN or infinite; tensors on the device.

    by_place: bool [num_documents, A + 2], true where a document has such values. The second dimension
        is in the order of `finite.place_names`.
    left_out_T: bool [T], true for all tokens of documents that have any such value.
    """

    by_place: torch.Tensor
    left_out_T: torch.Tensor


TOKEN_BYTES = 8 + 1 + 4 + 1  # id, assistant mask, at most one start of a document, left out or not
SLOT_BYTES = 8 + 4 + 4  # position, argmax, log-sum-exp


@dataclass(frozen=True)
class StateWidths:
    """Sizes of the states in a micro-batch.

    aux_bytes, embed_bytes: of the auxiliary states and the embedding of one token.
    last_hidden_bytes: of the last hidden state of one slot.
    num_predictions: predictions per position, each with one byte that says whether it is allowed.
    """

    aux_bytes: int
    embed_bytes: int
    last_hidden_bytes: int
    num_predictions: int


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one draft step: documents, target outputs, token embeddings and allowed rows.

    embed_TD: [T, D], rows of the target's embedding table; D is the target's hidden size.
    allowed_ST: bool [S, T], result of `allowed_rows`.
    faults: documents that are left out; None if the hidden states were not checked.
    peak_s: seconds that its FLOPs would take at the peak rate of the device; None = unknown.
    """

    batch: PackedBatch
    target: TargetOutput
    embed_TD: torch.Tensor
    allowed_ST: torch.Tensor
    faults: StateFaults | None = None
    peak_s: float | None = None

    @property
    def num_tokens(self) -> int | torch.Tensor:
        """Number of tokens in documents not left out: an int, or an int64 scalar on the device."""
        if self.faults is None:
            return self.batch.num_tokens
        return self.batch.num_tokens - self.faults.left_out_T.sum()

    @staticmethod
    def num_bytes(num_tokens: int, num_slots: int, widths: "StateWidths") -> int:
        """Return an upper bound of the memory of a micro-batch's states."""
        per_token = widths.aux_bytes + widths.embed_bytes + widths.num_predictions
        return num_tokens * (per_token + TOKEN_BYTES) + num_slots * (widths.last_hidden_bytes + SLOT_BYTES)

    @property
    def num_left_out(self) -> int | torch.Tensor:
        """Number of documents that are left out: an int, or an int64 scalar on the device."""
        return 0 if self.faults is None else self.faults.by_place.any(1).sum()

    @property
    def num_slots(self) -> int | torch.Tensor:
        """Number of slots in documents not left out: an int, or an int64 scalar on the device."""
        if self.faults is None:
            return self.target.slots_N.numel()
        return self.target.slots_N.numel() - self.faults.left_out_T[self.target.slots_N].sum()


@dataclass(frozen=True)
class LossNorms:
    """Divisors of a micro-batch's losses, fixed before its backward pass.

    slots: fp32 scalar, divisor of the loss, in the units of the objective; for EAGLE-3 the number of slots.
    loss_rows_S: fp32 [S], divisor of LK means: the number of rows with loss at each step.
    acceptance_S: fp32 [S], mean acceptance rates, for losses that depend on them; None = the rates of the
        micro-batch itself.
    """

    slots: torch.Tensor
    loss_rows_S: torch.Tensor
    acceptance_S: torch.Tensor | None = None

    @property
    def per_row_S(self) -> torch.Tensor:
        """Weight of a row in a mean over the rows with loss of its step, fp32 [S]."""
        return 1 / self.loss_rows_S.clamp_min(1)


@dataclass(frozen=True)
class DraftOutput:
    """Result of a draft on one micro-batch, with one entry per prediction `i` (a TTT step or a head).

    loss: fp32 scalar in nats, weighted sum of the normalised losses; differentiable.
    loss_S: fp32 [S], normalised losses before weights are applied.
    num_loss_rows_S: int64 [S], number of rows with loss.
    num_allowed_rows_S: int64 [S], number of rows that the mask allows.
    num_correct_S: fp32 [S], number of rows where the draft gives no token a higher probability
        than the target's most likely token.
    accepted_S: fp32 [S], sum over rows with loss of sum_v min(p_full, q).
    """

    loss: torch.Tensor
    loss_S: torch.Tensor
    num_loss_rows_S: torch.Tensor
    num_allowed_rows_S: torch.Tensor
    num_correct_S: torch.Tensor
    accepted_S: torch.Tensor
