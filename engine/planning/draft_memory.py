"""Memory of the draft's training state per rank: weights, gradients and optimizer states in ZeRO.

Only tensors that are in memory at the same time are counted, without the allocator's overhead.
"""

from dataclasses import dataclass
from typing import Any

import torch

from engine.config.ds_config import compute_dtype
from engine.models.costs import FULL

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default for reduce_bucket_size
MOMENTS = 2  # moments per weight in Adam


@dataclass(frozen=True)
class Sharing:
    """How DeepSpeed distributes the draft's training state over the ranks.

    stage: ZeRO stage. num_ranks: number of ranks.
    itemsize: bytes of a number in the draft's compute precision.
    gradient_itemsize: bytes of a number in the precision of gradient accumulation.
    bucket_bytes: size of one buffer for gradient reduction. num_buckets: number of these buffers.
    offloads_optimizer, offloads_weights: whether they are offloaded to the host or to disk.
    """

    stage: int
    num_ranks: int
    itemsize: int
    gradient_itemsize: int
    bucket_bytes: int
    num_buckets: int
    offloads_optimizer: bool
    offloads_weights: bool

    @classmethod
    def of(cls, ds_config: dict[str, Any], num_ranks: int) -> "Sharing":
        """Return the distribution that a DeepSpeed configuration describes."""
        zero = ds_config.get("zero_optimization", {})
        itemsize = getattr(torch, compute_dtype(ds_config)).itemsize
        added_up = ds_config.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            stage=zero.get("stage", 0),
            num_ranks=num_ranks,
            itemsize=itemsize,
            gradient_itemsize={None: itemsize, "fp32": FULL}.get(added_up, 2),
            bucket_bytes=int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS)) * itemsize,
            num_buckets=2 if zero.get("overlap_comm") and zero.get("stage", 0) < 3 else 1,
            offloads_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            offloads_weights=zero.get("offload_param", {}).get("device", "none") != "none",
        )

    def weights(self, count: int) -> int:
        """Return the bytes of resident weights."""
        if self.offloads_weights:
            return 0
        return (self._part(count) if self.stage == 3 else count) * self.itemsize

    def optimizer(self, count: int) -> int:
        """Return the bytes of Adam's moments and of the fp32 master weights.

        Stage 0 has master weights only if the draft computes in a lower precision.
        """
        numbers = MOMENTS + (self.stage > 0 or self.itemsize < FULL)
        return 0 if self.offloads_optimizer else FULL * numbers * self._part(count)

    def buffers(self, count: int) -> int:
        """Return the bytes of resident gradient buffers: in stage 3, the bucket and the shard."""
        if self.stage < 3:
            return 0
        return self.bucket_bytes + (0 if self.offloads_optimizer else self.gradient_itemsize * self._part(count))

    def gathered(self, count: int) -> int:
        """Return the bytes of weights that are gathered for a forward or backward pass only."""
        whole = self.stage == 3 and (self.num_ranks > 1 or self.offloads_weights)
        return self.itemsize * count if whole else 0

    def gradients(self, count: int) -> int:
        """Return the bytes of gradients that exist from the backward pass to the optimizer step."""
        return 0 if self.stage == 3 else self.gradient_itemsize * self._part(count)

    def buckets(self) -> int:
        """Return the bytes of the gradient buckets that exist only in the backward pass."""
        return self.num_buckets * self.bucket_bytes if self.stage in (1, 2) else 0

    def step(self, count: int, fused: bool) -> int:
        """Return the bytes of temporary tensors in the optimizer step.

        These are fp32 gradients, and intermediate results of an optimizer without a fused kernel.
        """
        if self.offloads_optimizer:
            return 0
        part = FULL * self._part(count)
        return part if fused or self.stage == 0 else part * (1 + MOMENTS)

    def step_traffic(self, count: int) -> int:
        """Return the bytes that an Adam step moves on a rank at least.

        States are read and written, gradients are read, and weights are written in the compute precision.
        """
        return 2 * self.optimizer(count) + (self.gradient_itemsize + self.itemsize) * self._part(count)

    def _part(self, count: int) -> int:
        return -(-count // self.num_ranks) if self.stage else count
