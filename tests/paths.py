"""Every way in which the engine can compute a training-time test, for tests that hold them all to the same result."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.kernels import PLAIN, Kernels, flash_where_dense, fused, reference
from engine.kernels.vocab_loss import LossPass


@dataclass(frozen=True)
class ComputePath:
    """kernels: what runs. compaction: as `ttt.compaction`. slots_per_chunk: of the loss; None = as many as memory allows.

    Triton's kernels run on a GPU if there is one, else in its interpreter; the fixture `path` in conftest.py takes care of it.
    """

    kernels: Callable[[], Kernels] = lambda: PLAIN
    compaction: bool = True
    slots_per_chunk: int | None = None
    needs_triton: bool = False
    needs_gpu: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if (self.needs_triton or self.needs_gpu) and torch.cuda.is_available() else "cpu")


def triton_kernels(recompute: str = "none") -> Kernels:
    from engine.kernels import ancestor_attention, row_loss

    return Kernels(ancestor_attention.ancestor_attention, loss_pass=LossPass(row_loss.row_loss), recompute=recompute)


PATHS = {
    "compacted": ComputePath(),
    "uncompacted": ComputePath(compaction=False),
    "small chunks": ComputePath(slots_per_chunk=3),
    "reference": ComputePath(lambda: Kernels(reference.ancestor_attention, reference.vocab_loss)),
    "recompute mlp": ComputePath(lambda: Kernels(recompute="mlp")),
    "recompute step": ComputePath(lambda: Kernels(recompute="step")),
    "triton": ComputePath(triton_kernels, needs_triton=True),
    "triton, uncompacted": ComputePath(triton_kernels, compaction=False, needs_triton=True),
    "triton, small chunks, recompute step": ComputePath(lambda: triton_kernels("step"), slots_per_chunk=3, needs_triton=True),
    "as a GPU runs it": ComputePath(lambda: fused(PLAIN), needs_gpu=True),
    "flash": ComputePath(lambda: flash_where_dense(triton_kernels()), needs_triton=True),
    "flash, uncompacted": ComputePath(lambda: flash_where_dense(triton_kernels()), compaction=False, needs_triton=True),
}
