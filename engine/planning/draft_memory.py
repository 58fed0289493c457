"""Memory of the draft per rank: weights, gradients and optimizer states in ZeRO, and activations.

Only tensors that are in memory at the same time are counted, without the allocator's overhead.
"""

from dataclasses import dataclass
from typing import Any

import torch

from engine.config.ds_config import compute_dtype
from engine.config.sections import CHUNK_MB, LossSection
from engine.kernels.vocab_loss import LossPass
from engine.models.eagle3.flops import DraftShape, StepCounts
from engine.models.losses.loss_registry import make_loss

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default for reduce_bucket_size
FULL = 4  # bytes of an fp32 number
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

    def _part(self, count: int) -> int:
        return -(-count // self.num_ranks) if self.stage else count


@dataclass(frozen=True)
class DraftStates:
    """Activation memory of a micro-batch, in the forward pass and in the backward pass.

    itemsize: bytes of a number.
    fused: whether liger-kernel's norms and SwiGLU are used, which keep less than PyTorch's,
    together with a loss that works in place.
    recompute: the option `ttt.recompute`.
    """

    shape: DraftShape
    counts: StepCounts
    loss: LossSection
    itemsize: int
    fused: bool
    recompute: str = "none"

    def kept(self) -> int:
        """Return the bytes in memory between the forward and the backward pass.

        These are the states of all rows and the gradients of the loss.
        """
        size = self.shape.hidden_size
        rows = self.counts.num_loss_rows
        normed = rows * size * (self.itemsize if self.fused else 2 * FULL)
        head = size * self.shape.draft_vocab_size * getattr(torch, self.loss.gradient_dtype).itemsize
        states = sum(self._of_layer(layer) for layer in range(self.shape.num_layers))
        fused_TD = self.counts.num_tokens * size * self.itemsize  # output of `fc`
        return states + fused_TD + normed + rows * size * self.itemsize + head

    def on_top(self) -> int:
        """Return the most bytes that a loss chunk or a part of the backward pass adds."""
        size = self.shape.hidden_size
        rows = self.counts.num_loss_rows
        most = max(self.counts.rows_S, default=0)
        # The head's gradient in the weights' precision.
        head = size * self.shape.draft_vocab_size * self.itemsize
        mlp = (2 if self.fused else 4) * most * self.shape.intermediate_size * self.itemsize
        norm = rows * size * (self.itemsize if self.fused else 3 * FULL)
        again = 0
        if self.recompute == "mlp":
            again = most * self._mlp_row()
        elif self.recompute == "step":
            again = self.shape.num_layers * most * (self._key_row(0) + self._query_row("none"))
        return max(self._chunk() + 2 * rows * size * self.itemsize, head + max(norm, mlp + again))

    def _chunk(self) -> int:
        device = "cuda" if self.fused else "cpu"
        limit = (self.loss.chunk_mb or CHUNK_MB[device]) << 20
        dtype = torch.bfloat16 if self.itemsize < FULL else torch.float32
        loss_pass = LossPass(in_place=self.fused).for_score(make_loss(self.loss).score)
        bytes_per_slot = loss_pass.bytes_per_slot(len(self.counts.rows_S), self.shape.draft_vocab_size, dtype)
        return min(limit, self.counts.num_slots * bytes_per_slot)

    def _of_layer(self, layer: int) -> int:
        counts = self.counts
        last = layer == self.shape.num_layers - 1
        asking = (counts.rows_S[0] if last else counts.num_tokens) + sum(counts.rows_S[1:])
        giving = counts.num_tokens + sum(counts.rows_S[1:])
        if self.recompute == "step":
            return asking * self.shape.hidden_size * self.itemsize + giving * self._key_value_row()
        picked = asking < giving  # Then queries are computed from a copy of the chosen rows.
        copied = counts.rows_S[0] * self._input_size(layer) * self.itemsize if picked else 0
        return giving * self._key_row(layer) + asking * self._query_row(self.recompute) + copied

    def _input_size(self, layer: int) -> int:
        return self.shape.hidden_size * (2 if layer == 0 else 1)

    def _key_value_row(self) -> int:
        return 2 * self.shape.num_groups * self.shape.head_dim * self.itemsize

    def _key_row(self, layer: int) -> int:
        """Return the bytes per row with a key.

        These are the normed inputs, what the norms keep, the key and value, and the rotary angles.
        """
        size = self.shape.hidden_size
        inputs = self._input_size(layer)
        norms = inputs * self.itemsize if self.fused else size * FULL * (3 if layer == 0 else 2)
        return inputs * self.itemsize + norms + self._key_value_row() + 2 * self.shape.head_dim * FULL

    def _query_row(self, recompute: str) -> int:
        """Return the bytes per row with a query: query, output, log-sum-exp and MLP states."""
        attended = 2 * self.shape.num_heads * self.shape.head_dim * self.itemsize + self.shape.num_heads * FULL
        return attended + (self.shape.hidden_size * self.itemsize if recompute == "mlp" else self._mlp_row())

    def _mlp_row(self) -> int:
        size = self.shape.hidden_size
        width = self.shape.intermediate_size
        norm = size * self.itemsize if self.fused else 2 * size * FULL
        return norm + (size + (3 if self.fused else 4) * width) * self.itemsize
