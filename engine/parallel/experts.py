"""Expert parallelism: own tokens go to the ranks that hold their experts, once per rank, and come back as sums.

Router, shared experts and the experts' own products stay the model's. No token is dropped, however
unevenly they fall. The host reads once per layer: how many rows and choices each rank sends to each
other one, which gives the sizes of tensors and messages.
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
# Bytes; Triton then sees that rows are sixteen values of any precision apart, and reads sixteen bytes at a time.
ALIGNMENT = 64


def dispatch(experts: nn.Module, num_experts: int, group: Group, parts: int = 1, fp8_exchange: str = "none") -> None:
    """Let an experts module, `(hidden [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]`, run over a group.

    It holds experts rank * n .. rank * n + n - 1, `n = num_experts / group.size`, under the local ids
    0 .. n - 1. parts: chunks of a rank's tokens, of which one is exchanged while another is multiplied.
    fp8_exchange: that of `ParallelSection`.
    """
    num_local = num_experts // group.size
    inner = _beside_identity(experts.forward, num_local) if num_identities(experts) else experts.forward
    local = LocalExperts(inner, num_local, grouped_products(experts))
    experts.forward = ExpertExchange(local, group, parts, fp8_exchange).forward


@dataclass(frozen=True)
class ExpertExchange:
    """The forward of experts that a group shares. Its arguments are those of `dispatch`."""

    local: LocalExperts
    group: Group
    parts: int
    fp8_exchange: str

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args, **kwargs) -> Tensor:
        """Return each token's weighted sum over its experts; a collective of the group.

        Every rank issues its exchanges in the same order: rows of part p + 1 leave before part p is
        multiplied, and results of part p leave behind them.
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
        """Start sending a part's rows with the choices that their receivers are to compute."""
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
        """Sums over this rank's experts, of rows that have arrived."""
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
        """Write the sum of the results that came back for each token of a part, rank 0's first."""
        weight_TR = None
        if record.is_fp8:
            scale_N = record.scale(back)
            if len(scale_N):
                weight_TR = scale_N[part.place_TR.clamp_min(0)]
            back = record.rows(back)
        choose_token_permute(back.device).unpermute_rows(back, part.place_TR, out_TD, weight_TR)


@dataclass(frozen=True)
class Record:
    """The bytes that travel for one row: values, or codes and their scale; then weights and ids of its choices.

    width: values of a row. dtype: of the model. num_choices: weights in fp32 and local ids in int16
    that go with a row. is_fp8: whether the values travel as e4m3 with one scale per row.
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
        """Return the values or codes, [N, D]; a view, as those below."""
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
        """Write row `source_N[n]` to record n, rounded to fp8 where records are. source_N: None only where they are."""
        permute = choose_token_permute(rows_TD.device)
        if self.is_fp8:
            permute.quantise_rows(rows_TD, source_N, self.rows(buffer_NB), self.scale(buffer_NB))
        else:
            permute.permute_rows(rows_TD, source_N, self.rows(buffer_NB))


def _aligned(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class RoutedPart:
    """Tokens start .. stop - 1 of a rank and their rows: one for each rank that holds any of their experts.

    place_TR: where the row to each rank lies among those that leave, sorted by rank, -1 for none.
    sent, received: rows by rank. num_choices: of local experts, by the rows that arrive.
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
        """Token, counted from the part's first, and receiver of each row, int64 [N] both."""
        num_tokens, num_ranks = self.place_TR.shape
        slot_TR = torch.where(self.place_TR < 0, self.num_sent, self.place_TR)  # one more slot takes what is not sent
        pair_S = torch.arange(slot_TR.numel(), device=slot_TR.device)
        pair_N = pair_S.new_empty(self.num_sent + 1).scatter_(0, slot_TR.flatten(), pair_S)[: self.num_sent]
        return pair_N // num_ranks, pair_N % num_ranks


def routed_parts(index_TK: Tensor, num_local: int, count: int, group: Group) -> list[RoutedPart]:
    """Divide a rank's tokens into `count` parts and find their rows; a collective of the group, and one read by the host.

    index_TK: ids of experts, of which each rank holds `num_local`; others belong to no rank.
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
    sent, received = torch.stack((sent_RP2, received_RP2)).permute(0, 2, 3, 1).tolist()  # the one read
    parts = []
    for number, place_TR in enumerate(places):
        rows_sent, _ = sent[number]
        rows_received, choices = received[number]
        parts.append(RoutedPart(edges[number], edges[number + 1], place_TR, rows_sent, rows_received, sum(choices)))
    return parts


def num_identities(experts: nn.Module) -> int:
    """How many of the experts that a router chooses from have no weights, and return their tokens as they are."""
    return getattr(experts, "zero_expert_num", None) or 0


def keep_identities(experts: nn.Module, num_experts: int) -> None:
    """Let what experts without weights return, whose ids begin at `num_experts`, be added where the token lies."""
    inner = experts.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        is_identity_TK = top_k_index >= num_experts
        weight_T1 = top_k_weights.masked_fill(~is_identity_TK, 0).sum(-1, keepdim=True)
        result_TD = inner(hidden_states, top_k_index, top_k_weights.masked_fill(is_identity_TK, 0))
        return result_TD + (hidden_states * weight_T1).to(result_TD.dtype)

    experts.forward = forward


def _beside_identity(inner, identity: int):
    """Experts called with one choice a token, which LongCat's cannot take alone: beside that of an identity, with weight 0."""

    def forward(rows_MD: Tensor, index_M1: Tensor, weights_M1: Tensor) -> Tensor:
        index_M2 = torch.cat((index_M1, torch.full_like(index_M1, identity)), dim=1)
        return inner(rows_MD, index_M2, torch.cat((weights_M1, torch.zeros_like(weights_M1)), dim=1))

    return forward


def dispatch_dense(moe: Any, num_experts: int, group: Group, parts: int, fp8_exchange: str) -> None:
    """`dispatch` for Llama 4, whose experts take inputs that the router has scaled, as many for each expert.

    moe: a module with `router` (hidden [T, D] -> scores [T, num_experts], 0 where not chosen), `shared_expert` and `experts`.
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
