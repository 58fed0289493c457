"""Run the target on packed batches to make the draft's inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.batch import MicroBatch, PackedBatch, StateWidths, TargetOutput, to_device
from engine.hidden_states.finite import without_faulty_documents
from engine.hidden_states.protocol import Target
from engine.models.draft_method import DraftConfig, DraftMethod
from engine.target.frozen import FrozenTarget


@dataclass(frozen=True)
class Rows:
    """A packed batch with the rows that the draft learns from, on the host.

    allowed_ST: bool [S, T], result of `allowed_rows`. slots_N: int64 [N], ascending.
    peak_s: as in `MicroBatch`.
    """

    batch: PackedBatch
    allowed_ST: torch.Tensor
    slots_N: torch.Tensor
    peak_s: float | None = None


class MicroBatchMaker:
    """Makes the micro-batches of one rank from packed batches on the host."""

    def __init__(
        self,
        method: DraftMethod,
        target: Target,
        dtype: torch.dtype,
        device: torch.device,
        peak_seconds: Callable[[PackedBatch, torch.Tensor], float | None] | None = None,
    ) -> None:
        """Create it.

        dtype: precision in which the draft reads the states.
        peak_seconds: returns `MicroBatch.peak_s`, given a batch and its allowed rows on the host.
        """
        self._method = method
        if isinstance(target, FrozenTarget):
            target = target.with_head_stats(method.needs_head_stats)
        self._target = target
        self._dtype = dtype
        self._device = device
        self._peak_seconds = peak_seconds

    def __call__(self, batch: PackedBatch) -> MicroBatch:
        """Run the target; a collective if ranks share it."""
        rows = self.rows(batch)
        rows = replace(rows, batch=batch.to(self._device))
        return self.finish(rows, self._target(rows.batch, rows.slots_N))

    def rows(self, batch: PackedBatch) -> "Rows":
        """Return the rows of a batch; computed on the host, so that nothing waits for the device."""
        allowed_ST = self._method.allowed_rows(batch)
        peak_s = None if self._peak_seconds is None else self._peak_seconds(batch, allowed_ST)
        return Rows(batch, allowed_ST, self._method.slots(allowed_ST), peak_s)

    def finish(self, rows: "Rows", output: TargetOutput) -> MicroBatch:
        """Return the micro-batch, given the target's output; a collective if ranks share the embedding."""
        batch = rows.batch.to(self._device)
        embed_TD = output.embed_TD
        if embed_TD is None:
            embed_TD = self._target.embedding.rows(batch.input_ids_T)
        output = replace(output, aux_TA=output.aux_TA.to(self._dtype), embed_TD=None)
        allowed_ST = to_device(rows.allowed_ST, self._device)
        micro = MicroBatch(batch, output, embed_TD.to(self._dtype), allowed_ST, peak_s=rows.peak_s)
        return without_faulty_documents(micro)

    def widths(self, config: DraftConfig, num_predictions: int) -> StateWidths:
        """Return the sizes of the states. num_predictions: predictions of the draft per position."""
        width = config.target_hidden_size
        return StateWidths(
            aux_bytes=len(self._target.aux_layers) * width * self._dtype.itemsize,
            embed_bytes=width * self._dtype.itemsize,
            last_hidden_bytes=width * self._target.dtype.itemsize,
            num_predictions=num_predictions,
        )
