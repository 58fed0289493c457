"""Plan of the rows of a training-time test that have to run (compaction).

Row `(t, i)` is position `t` at step `i` and learns slot `u = t + 1 + i`.
"""

from dataclasses import dataclass

import torch

from engine.batch import documents_of
from engine.kernels import LossRows
from engine.kernels.row_index import ROW_GRANULE


@dataclass(frozen=True)
class RowPlan:
    """The rows that run, and those of them that carry loss.

    Row `(t, i)` with `i >= 1` is read only by later rows of its chain, that is, of position `t`. So
    a row runs only if it or a later row of its chain carries loss. A few more rows run as padding,
    to make the number a multiple of `ROW_GRANULE`. Every position still provides its key and value
    at step 0. Without compaction all rows run. If the rows of each document have successive
    positions, the padding rows are chosen so that this stays true.

    kept: for each step, indices of its rows into the rows of the previous step (at step 0, into the
        positions), int64, ascending; None = all of them.
    is_dense: for each step, whether the rows of each document are known to have successive
        positions.
    loss_rows: for each step, indices of the rows with loss into its rows.
    loss: the rows with loss, as the vocabulary loss takes them.
    """

    kept: list[torch.Tensor | None]
    is_dense: list[bool]
    loss_rows: list[torch.Tensor]
    loss: LossRows


def plan_rows(carries_loss_ST, slot_ST, cu_seqlens: torch.Tensor, slots_per_chunk: int, compaction: bool) -> RowPlan:
    """Return the rows that a micro-batch needs. Reads from the device once.

    carries_loss_ST: bool [S, T], from `loss_rows`. slot_ST: int64 [S, T], from `row_slots`.
    slots_per_chunk: slots per chunk of the vocabulary loss.
    compaction: whether to run only the rows that a loss depends on.
    """
    steps, num_tokens = carries_loss_ST.shape
    alive_ST = torch.ones_like(carries_loss_ST)
    if compaction:
        alive_ST = carries_loss_ST.flip(0).cummax(0).values.flip(0)
    document_T = documents_of(cu_seqlens, num_tokens)
    num_chunks = 1 + num_tokens // slots_per_chunk
    counts = _read_counts(alive_ST, carries_loss_ST, slot_ST // slots_per_chunk, num_chunks, document_T)

    running = _RunningRows(document_T)
    kept: list[torch.Tensor | None] = []
    is_dense: list[bool] = []
    loss_rows: list[torch.Tensor] = []
    slots: list[torch.Tensor] = []
    bounds: list[list[int]] = []
    first_loss_row = 0
    for step in range(steps):
        kept.append(running.keep(alive_ST[step], counts[step]))
        is_dense.append(running.is_dense)
        position_R = _positions(carries_loss_ST[step], counts[step].num_loss_rows)
        loss_rows.append(running.rank_T[position_R])
        slots.append(slot_ST[step, position_R])
        bounds.append([first_loss_row, *(first_loss_row + end for end in counts[step].chunk_ends)])
        first_loss_row += counts[step].num_loss_rows
    return RowPlan(kept, is_dense, loss_rows, LossRows(torch.cat(slots), bounds, slots_per_chunk))


@dataclass(frozen=True)
class _StepCounts:
    """Counts of one step, on the host.

    num_alive: rows that a loss depends on. num_gaps: gaps between them.
    chunk_ends: rows with loss up to the end of each chunk of slots.
    """

    num_alive: int
    num_gaps: int
    chunk_ends: list[int]

    @property
    def num_loss_rows(self) -> int:
        return self.chunk_ends[-1]


def _read_counts(
    alive_ST: torch.Tensor,
    carries_loss_ST: torch.Tensor,
    chunk_ST: torch.Tensor,
    num_chunks: int,
    document_T: torch.Tensor,
) -> list[_StepCounts]:
    """Return the counts of every step; the only read from the device.

    chunk_ST: int64 [S, T], chunk of each row's slot.
    """
    per_chunk_SC = chunk_ST.new_zeros(len(chunk_ST), num_chunks)
    per_chunk_SC.scatter_add_(1, torch.where(carries_loss_ST, chunk_ST, 0), carries_loss_ST.long())
    columns = alive_ST.sum(1, keepdim=True), _gaps(alive_ST, document_T), per_chunk_SC.cumsum(1)
    return [_StepCounts(num_alive, num_gaps, ends) for num_alive, num_gaps, *ends in torch.cat(columns, 1).tolist()]


class _RunningRows:
    """The rows that run at the current step, from one step to the next.

    rank_T: index of each position among them, for positions that run.
    is_dense: whether the rows of each document are known to have successive positions.
    """

    def __init__(self, document_T: torch.Tensor) -> None:
        self._document_T = document_T
        self._granule = ROW_GRANULE[document_T.device.type]
        self._num_rows = len(document_T)
        self._runs_T = torch.ones_like(document_T, dtype=torch.bool)
        self.rank_T = torch.arange(len(document_T), device=document_T.device)
        self.is_dense = True

    def keep(self, alive_T: torch.Tensor, counts: _StepCounts) -> torch.Tensor | None:
        """Keep the alive rows, and spare ones up to a multiple of the granule.

        Return the indices of these rows among the rows so far, int64; None = all of them.
        """
        wanted = min(self._num_rows, -(-counts.num_alive // self._granule) * self._granule)
        num_spare = wanted - counts.num_alive
        alive_alone_are_dense = counts.num_gaps == 0 and num_spare == 0
        if wanted == self._num_rows:
            self.is_dense = self.is_dense or alive_alone_are_dense
            return None
        spare_T = self._runs_T & ~alive_T
        keeps_dense = self.is_dense and counts.num_gaps == 0
        if keeps_dense and num_spare:
            spare_T = _neighbours(alive_T, spare_T, self._document_T, num_spare)
        else:
            spare_T &= spare_T.cumsum(0) <= num_spare
        self._runs_T = alive_T | spare_T
        kept = self.rank_T[_positions(self._runs_T, wanted)]
        self.rank_T = self._runs_T.cumsum(0) - 1
        self.is_dense = keeps_dense or alive_alone_are_dense
        self._num_rows = wanted
        return kept


def _gaps(alive_ST: torch.Tensor, document_T: torch.Tensor) -> torch.Tensor:
    """Return the number of gaps between the rows of each step, int64 [S, 1].

    A document with n runs of successive rows has n - 1 gaps.
    """
    num_steps, num_tokens = alive_ST.shape
    begins_T = torch.nn.functional.pad(document_T.diff() > 0, (1, 0), value=True)
    run_starts_ST = alive_ST & (begins_T | ~torch.nn.functional.pad(alive_ST, (1, -1)))
    num_rows_ST = torch.zeros(num_steps, num_tokens, dtype=torch.long, device=alive_ST.device)  # at most T documents
    has_rows_ST = num_rows_ST.scatter_add_(1, document_T.expand_as(alive_ST), alive_ST.long()) > 0
    return run_starts_ST.sum(1, keepdim=True) - has_rows_ST.sum(1, keepdim=True)


def _neighbours(alive_T: torch.Tensor, spare_T: torch.Tensor, document_T: torch.Tensor, num_spare: int) -> torch.Tensor:
    """Choose `num_spare` of the spare positions that extend each document's run of alive positions.

    Returns bool [T]. Each document has one run of alive positions. Documents are filled in order.
    In each, the positions after the run are taken first, in ascending order, then those before it,
    in descending order. So alive and chosen positions always form one run per document.
    """
    num_tokens = alive_T.shape[0]
    position_T = torch.arange(num_tokens, device=alive_T.device)
    alive_until_T = alive_T.cumsum(0)
    alive_in_all = torch.zeros(num_tokens, dtype=torch.long, device=alive_T.device)
    alive_by_end = alive_in_all.scatter_reduce_(0, document_T, alive_until_T, "amax")
    is_behind_T = alive_until_T == alive_by_end[document_T]
    order_T = torch.where(is_behind_T, position_T, 2 * num_tokens - position_T)
    key_T = torch.where(spare_T, 2 * num_tokens * document_T + order_T, torch.iinfo(torch.long).max)
    return torch.zeros_like(spare_T).index_fill_(0, key_T.argsort()[:num_spare], True)


def _positions(mask_T: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions at which the mask is True, int64 [count].

    The count is known, so nothing is read from the device.
    """
    return torch.nonzero_static(mask_T, size=count).flatten()
