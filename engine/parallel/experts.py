"""Expert parallelism: send each token once to every rank that holds any of its experts.

The ranks return sums over their experts. The router, the shared experts and the experts' products
are those of the model. No token is dropped, however uneven the routing is. The host reads from the
device once per layer: the numbers of rows and choices that ranks send to each other, which
determine the sizes of tensors and messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels import choose_token_permute
from engine.parallel.collectives import Finish, exchange_counts, start_exchanging
from engine.parallel.expert_products import LocalExperts, gated_products, grouped_products
from engine.parallel.mesh import Group

CODES = torch.float8_e4m3fn
# In bytes. With this alignment, Triton knows that the row stride is a multiple of 16 values of any
# precision, and reads 16 bytes at a time.
ALIGNMENT = 64


def dispatch(experts: nn.Module, num_experts: int, group: Group, parts: int = 1, fp8_exchange: str = "none") -> None:
    """Let the ranks of a group share an experts module.

    The forward of the module maps hidden [T, D], top_k_index [T, K] and top_k_weights [T, K] to
    [T, D]. With `n = num_experts / group.size`, this rank holds experts `rank * n` to
    `rank * n + n - 1` under the local ids 0 to `n - 1`.
    parts: chunks of local tokens, so that communication of one overlaps with compute of another.
    fp8_exchange: `ParallelSection.fp8_exchange`.
    """
    num_local = num_experts // group.size
    inner = _beside_identity(experts.forward, num_local) if num_identities(experts) else experts.forward
    local = LocalExperts(inner, num_local, grouped_products(experts))
    experts.forward = ExpertExchange(local, group, parts, fp8_exchange).forward


@dataclass(frozen=True)
class ExpertExchange:
    """Forward of an experts module that the ranks of a group share.

    group, parts, fp8_exchange: see `dispatch`.
    """

    local: LocalExperts
    group: Group
    parts: int
    fp8_exchange: str

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args, **kwargs) -> Tensor:
        """Return each token's weighted sum over its experts; a collective of the group.

        Every rank starts its exchanges in the same order: the rows of chunk p + 1 are sent before
        chunk p is multiplied, and the results of chunk p are sent after that.
        """
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        index_TK = top_k_index.reshape(-1, top_k_index.shape[-1])
        weight_TK = top_k_weights.reshape(-1, top_k_weights.shape[-1])
        there = Record(hidden_TD.shape[1], hidden_TD.dtype, index_TK.shape[1], self.fp8_exchange != "none")
        back = Record(hidden_TD.shape[1], hidden_TD.dtype, 0, self.fp8_exchange == "both")
        parts = routed_parts(index_TK, self.local.num_experts, self.parts, self.group)
        result_TD = torch.empty_like(hidden_TD)
        arriving = self._send_rows(parts[0], there, hidden_TD, index_TK, weight_TK)
        leaving = []
        for number, part in enumerate(parts):
            finish = arriving
            if number + 1 < len(parts):
                arriving = self._send_rows(parts[number + 1], there, hidden_TD, index_TK, weight_TK)
            result_ND = self._multiply(part, there, finish(), weight_TK.dtype)
            leaving.append(self._send_results(part, back, result_ND))
        for part, finish in zip(parts, leaving, strict=True):
            self._sum(part, back, finish(), result_TD[part.start : part.stop])
        return result_TD.view_as(hidden_states)

    def _send_rows(
        self, part: "RoutedPart", record: "Record", hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Finish:
        """Start sending the rows of a chunk, with the choices that the receiving ranks compute."""
        token_N, rank_N = part.rows()
        buffer_NB = record.empty(part.num_sent, hidden_TD.device)
        record.write_rows(buffer_NB, hidden_TD[part.start : part.stop], token_N)
        own = slice(part.start, part.stop)
        index_NK = index_TK[own].index_select(0, token_N)
        local_NK = index_NK - rank_N[:, None] * self.local.num_experts
        is_there_NK = (local_NK >= 0) & (local_NK < self.local.num_experts)
        record.index(buffer_NB).copy_(torch.where(is_there_NK, local_NK, self.local.num_experts))
        record.weight(buffer_NB).copy_(weight_TK[own].index_select(0, token_N))
        return start_exchanging(buffer_NB, part.sent, part.received, self.group)

    def _multiply(self, part: "RoutedPart", record: "Record", buffer_NB: Tensor, weight_dtype: torch.dtype) -> Tensor:
        """Compute the weighted sums over this rank's experts for the rows received."""
        scale_N = record.scale(buffer_NB) if record.is_fp8 else None
        weight_NK = record.weight(buffer_NB).to(weight_dtype)
        rows_ND = record.rows(buffer_NB)
        index_NK = record.index(buffer_NB)
        return self.local(rows_ND, index_NK, weight_NK, part.num_choices, record.dtype, scale_N)

    def _send_results(self, part: "RoutedPart", record: "Record", result_ND: Tensor) -> Finish:
        if record.is_fp8:
            buffer_NB = record.empty(len(result_ND), result_ND.device)
            record.write_rows(buffer_NB, result_ND, None)
            result_ND = buffer_NB
        return start_exchanging(result_ND, part.received, part.sent, self.group)

    def _sum(self, part: "RoutedPart", record: "Record", back: Tensor, out_TD: Tensor) -> None:
        """Write the sum of the results returned for each token of a chunk, added in rank order."""
        weight_TR = None
        if record.is_fp8:
            scale_N = record.scale(back)
            if len(scale_N):
                weight_TR = scale_N[part.place_TR.clamp_min(0)]
            back = record.rows(back)
        choose_token_permute(back.device).unpermute_rows(back, part.place_TR, out_TD, weight_TR)


@dataclass(frozen=True)
class Record:
    """Byte layout of the message for one row.

    A record holds the values of the row, or its codes and their scale, followed by the weights
    (fp32) and the local ids (int16) of its choices.
    width: values per row.
    dtype: precision of the model.
    num_choices: choices per row.
    is_fp8: whether values are sent as e4m3 with one scale per row.
    """

    width: int
    dtype: torch.dtype
    num_choices: int
    is_fp8: bool

    @property
    def num_bytes(self) -> int:
        return _aligned(self._weight_start + 6 * self.num_choices)

    @property
    def _row_bytes(self) -> int:
        return self.width * (1 if self.is_fp8 else self.dtype.itemsize)

    @property
    def _scale_start(self) -> int:
        return _aligned(self._row_bytes, 4)

    @property
    def _weight_start(self) -> int:
        return self._scale_start + (4 if self.is_fp8 else 0)

    def empty(self, count: int, device: torch.device) -> Tensor:
        """Return an uninitialised buffer of records, uint8 [count, num_bytes]."""
        return torch.empty(count, self.num_bytes, dtype=torch.uint8, device=device)

    def rows(self, buffer_NB: Tensor) -> Tensor:
        """Return a view of the values or codes, [N, D]."""
        return buffer_NB[:, : self._row_bytes].view(CODES if self.is_fp8 else self.dtype)

    def scale(self, buffer_NB: Tensor) -> Tensor:
        return buffer_NB[:, self._scale_start : self._scale_start + 4].view(torch.float32)[:, 0]

    def weight(self, buffer_NB: Tensor) -> Tensor:
        end = self._weight_start + 4 * self.num_choices
        return buffer_NB[:, self._weight_start : end].view(torch.float32)

    def index(self, buffer_NB: Tensor) -> Tensor:
        start = self._weight_start + 4 * self.num_choices
        return buffer_NB[:, start : start + 2 * self.num_choices].view(torch.int16)

    def write_rows(self, buffer_NB: Tensor, rows_TD: Tensor, source_N: Tensor | None) -> None:
        """Write row `source_N[n]` of rows_TD to record n, rounded to fp8 if `is_fp8`.

        source_N: None = every row in order, which is supported only if `is_fp8`.
        """
        permute = choose_token_permute(rows_TD.device)
        if self.is_fp8:
            permute.quantise_rows(rows_TD, source_N, self.rows(buffer_NB), self.scale(buffer_NB))
        else:
            permute.permute_rows(rows_TD, source_N, self.rows(buffer_NB))


def _aligned(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class RoutedPart:
    """A chunk of a rank's tokens, start .. stop - 1, and the rows sent for them.

    Each token has one row for every rank that holds any of its experts.
    place_TR: index of the token's row for each rank among the rows sent, which are sorted by rank;
    -1 if there is no such row.
    sent, received: number of rows for and from each rank.
    num_choices: choices of local experts among the rows received.
    """

    start: int
    stop: int
    place_TR: Tensor
    sent: Sequence[int]
    received: Sequence[int]
    num_choices: int

    @property
    def num_sent(self) -> int:
        return sum(self.sent)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return each row's token, counted from the start of the chunk, and its receiving rank.

        Both are int64 [N].
        """
        num_tokens, num_ranks = self.place_TR.shape
        # Pairs that are not sent go to an extra slot.
        slot_TR = torch.where(self.place_TR < 0, self.num_sent, self.place_TR)
        pair_S = torch.arange(slot_TR.numel(), device=slot_TR.device)
        pair_N = pair_S.new_empty(self.num_sent + 1).scatter_(0, slot_TR.flatten(), pair_S)[: self.num_sent]
        return pair_N // num_ranks, pair_N % num_ranks


def routed_parts(index_TK: Tensor, num_local: int, count: int, group: Group) -> list[RoutedPart]:
    """Divide a rank's tokens into `count` chunks and find the rows to send for each.

    A collective of the group. The host reads from the device once.
    index_TK: ids of experts. Each rank holds `num_local` of them; larger ids belong to no rank.
    """
    num_tokens = len(index_TK)
    edges = [num_tokens * number // count for number in range(count + 1)]
    ranks_R = torch.arange(group.size, device=index_TK.device)
    choices_TR = (index_TK[:, :, None] // num_local == ranks_R).sum(1)
    is_sent_TR = choices_TR > 0
    counts = []
    places = []
    for start, stop in zip(edges, edges[1:], strict=False):
        is_sent_RT = is_sent_TR[start:stop].t().contiguous()
        place_RT = (is_sent_RT.flatten().cumsum(0) - 1).view(is_sent_RT.shape)
        places.append(place_RT.masked_fill_(~is_sent_RT, -1).t())
        counts.append(torch.stack((is_sent_RT.sum(1), choices_TR[start:stop].sum(0)), 1))
    sent_RP2 = torch.stack(counts, 1)
    received_RP2 = exchange_counts(sent_RP2, group)
    # The host reads from the device only here.
    sent, received = torch.stack((sent_RP2, received_RP2)).permute(0, 2, 3, 1).tolist()
    parts = []
    for number, place_TR in enumerate(places):
        rows_sent, _ = sent[number]
        rows_received, choices = received[number]
        parts.append(RoutedPart(edges[number], edges[number + 1], place_TR, rows_sent, rows_received, sum(choices)))
    return parts


def num_identities(experts: nn.Module) -> int:
    """Return the number of identity experts, which have no weights and return their inputs."""
    return getattr(experts, "zero_expert_num", None) or 0


def keep_identities(experts: nn.Module, num_experts: int) -> None:
    """Add the results of identity experts (ids from `num_experts` on) on the token's own rank."""
    inner = experts.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        is_identity_TK = top_k_index >= num_experts
        weight_T1 = top_k_weights.masked_fill(~is_identity_TK, 0).sum(-1, keepdim=True)
        result_TD = inner(hidden_states, top_k_index, top_k_weights.masked_fill(is_identity_TK, 0))
        return result_TD + (hidden_states * weight_T1).to(result_TD.dtype)

    experts.forward = forward


def _beside_identity(inner, identity: int):
    """Return a forward that adds an identity expert with weight 0 to each token's only choice.

    LongCat's experts cannot be called with a single choice per token.
    """

    def forward(rows_MD: Tensor, index_M1: Tensor, weights_M1: Tensor) -> Tensor:
        index_M2 = torch.cat((index_M1, torch.full_like(index_M1, identity)), dim=1)
        return inner(rows_MD, index_M2, torch.cat((weights_M1, torch.zeros_like(weights_M1)), dim=1))

    return forward


def dispatch_dense(moe: Any, num_experts: int, group: Group, parts: int, fp8_exchange: str) -> None:
    """Let the ranks of a group share the experts of a Llama 4 MoE block; see `dispatch`.

    Llama 4's experts take inputs that the router has scaled, the same number for each expert.
    moe: a module with `router` (hidden [T, D] -> scores [T, num_experts], 0 where not chosen),
    `shared_expert` and `experts`.
    """
    experts = moe.experts
    width = experts.hidden_size
    local = LocalExperts(experts.forward, num_experts // group.size, gated_products(experts), scales_inputs=True)
    experts.forward = ExpertExchange(local, group, parts, fp8_exchange).forward

    def forward(hidden_states: Tensor):
        hidden_TD = hidden_states.reshape(-1, width)
        scores_TE, logits_TE = moe.router(hidden_TD)
        weights_TK, index_TK = scores_TE.topk(moe.top_k, dim=-1)
        return moe.shared_expert(hidden_TD) + experts(hidden_TD, index_TK, weights_TK), logits_TE

    moe.forward = forward
