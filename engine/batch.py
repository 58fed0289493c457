"""The nouns that travel between rooms: a packed batch, what the target says of it, what the draft makes of both."""

from dataclasses import dataclass, replace

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy there of a tensor of the host, which the host does not wait for; one that is there already stays."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x


def documents_of(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the number of each token's document, int64 [T]."""
    position_T = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), position_T, right=True) - 1


@dataclass(frozen=True)
class PackedBatch:
    """Documents laid end to end; no position is padding.

    input_ids_T: int64 [T], as tokenised, nothing shifted.
    assistant_mask_T: bool [T], true where the token is the assistant's.
    cu_seqlens: int32 [num_documents + 1], starts of documents and T at the end.
    document_ids: places of the documents in what was loaded; a store finds their hidden states by them. host_lengths: tokens of
    each document, on the host: reading them from a device would wait for all it has to do.
    """

    input_ids_T: torch.Tensor
    assistant_mask_T: torch.Tensor
    cu_seqlens: torch.Tensor
    document_ids: tuple[int, ...] = ()
    host_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.host_lengths:
            object.__setattr__(self, "host_lengths", tuple(self.cu_seqlens.diff().tolist()))

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.shape[0]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each document, int32 [num_documents]."""
        return self.cu_seqlens.diff()

    @property
    def position_T(self) -> torch.Tensor:
        """Position of a token in its own document, int64 [T]."""
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
    """What the draft needs of a target forward, and nothing else.

    aux_TA: [T, 3D] outputs of the three auxiliary layers, concatenated in ascending layer order.
    slots_N: int64 [N], ascending positions u whose target distribution is learned.
    last_hidden_ND: [N, D] state after the target's final norm at the slots.
    argmax_N: int32 [N], most likely token over the full vocabulary.
    lse_N: fp32 [N], log-sum-exp of the target's logits (after soft-cap, scale and temperature) over the full vocabulary.
    embed_TD: [T, D], rows of the target's embedding, where its forward had to exchange them; None = they are to be looked up.
    """

    aux_TA: torch.Tensor
    slots_N: torch.Tensor
    last_hidden_ND: torch.Tensor
    argmax_N: torch.Tensor
    lse_N: torch.Tensor
    embed_TD: torch.Tensor | None = None


@dataclass(frozen=True)
class StateFaults:
    """Documents of a packed batch whose states are NaN or infinite, on the device.

    by_place: bool [num_documents, 5], where a document has such values: `finite.place_names`.
    left_out_T: bool [T], the tokens of the documents that have any.
    """

    by_place: torch.Tensor
    left_out_T: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """All that one draft step reads: documents, the target's view of them, their token embeddings, and the rows allowed.

    embed_TD: [T, D], rows of the target's embedding, in the target's width. allowed_ST: bool [S, T], of `allowed_rows`.
    faults: documents that were left out of it; None if that was not looked for.
    """

    batch: PackedBatch
    target: TargetOutput
    embed_TD: torch.Tensor
    allowed_ST: torch.Tensor
    faults: StateFaults | None = None

    @property
    def num_tokens(self) -> int | torch.Tensor:
        """Tokens of the documents that are not left out: a number, or an int64 scalar on the device."""
        if self.faults is None:
            return self.batch.num_tokens
        return self.batch.num_tokens - self.faults.left_out_T.sum()

    @property
    def num_left_out(self) -> int | torch.Tensor:
        """Number of documents that are left out: a number, or an int64 scalar on the device."""
        return 0 if self.faults is None else self.faults.by_place.any(1).sum()

    @property
    def num_slots(self) -> int | torch.Tensor:
        """Number of slots of the documents that are not left out: a number, or an int64 scalar on the device."""
        if self.faults is None:
            return self.target.slots_N.numel()
        return self.target.slots_N.numel() - self.faults.left_out_T[self.target.slots_N].sum()


@dataclass(frozen=True)
class LossNorms:
    """What a micro-batch's losses are divided by, fixed before its backward pass.

    slots: fp32 scalar, divisor of the cross-entropy.
    loss_rows_S: fp32 [S], divisor of LK means, rows with loss at each step.
    acceptance_S: fp32 [S], mean acceptance rate that weighs `lk_lambda`; None takes the micro-batch's own.
    """

    slots: torch.Tensor
    loss_rows_S: torch.Tensor
    acceptance_S: torch.Tensor | None = None


@dataclass(frozen=True)
class DraftOutput:
    """One training-time test of a micro-batch, one entry a TTT step.

    loss: fp32 scalar in nats, the weighed sum of the normalised losses of all steps; differentiable. loss_S: fp32 [S], those
    losses before step weights.
    num_loss_rows_S, num_allowed_rows_S: int64 [S], rows with loss, and rows the mask allows.
    num_correct_S: fp32 [S], rows where no token is likelier under the draft than the target's most likely one.
    accepted_S: fp32 [S], sum over rows with loss of sum_v min(p_full, q).
    """

    loss: torch.Tensor
    loss_S: torch.Tensor
    num_loss_rows_S: torch.Tensor
    num_allowed_rows_S: torch.Tensor
    num_correct_S: torch.Tensor
    accepted_S: torch.Tensor
