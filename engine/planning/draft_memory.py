"""Bytes of the draft on a rank: weights, gradients and optimizer as DeepSpeed's stages share them, and a micro-batch's states.

Tensors that live at once are counted; what an allocator adds is not.
"""

from dataclasses import dataclass
from typing import Any

import torch

from engine.config.ds_config import compute_dtype
from engine.config.sections import CHUNK_MB, LossSection
from engine.kernels.vocab_loss import Walk
from engine.models.eagle3.flops import DraftShape, StepCounts

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's, where the file names none
FULL = 4  # bytes of a number in fp32
MOMENTS = 2  # of Adam


@dataclass(frozen=True)
class Sharing:
    """How DeepSpeed holds a draft's weights.

    itemsize: bytes of a number that the draft computes with; gradient_itemsize: of one in which gradients add up.
    bucket_bytes: of one buffer in which gradients are reduced.
    num_buckets: such buffers. offloads_optimizer, offloads_weights: to the host.
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
        """As a DeepSpeed configuration has it."""
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
        """That stay."""
        if self.offloads_weights:
            return 0
        return (self._part(count) if self.stage == 3 else count) * self.itemsize

    def optimizer(self, count: int) -> int:
        """Adam's moments and the weights in fp32; stage 0 has these only where the draft computes in less."""
        numbers = MOMENTS + (self.stage > 0 or self.itemsize < FULL)
        return 0 if self.offloads_optimizer else FULL * numbers * self._part(count)

    def buffers(self, count: int) -> int:
        """Of gradients, that stay: stage 3 keeps its bucket, and its part of them."""
        if self.stage < 3:
            return 0
        return self.bucket_bytes + (0 if self.offloads_optimizer else self.gradient_itemsize * self._part(count))

    def gathered(self, count: int) -> int:
        """Weights that are there for a pass alone."""
        whole = self.stage == 3 and (self.num_ranks > 1 or self.offloads_weights)
        return self.itemsize * count if whole else 0

    def gradients(self, count: int) -> int:
        """That are there from backward to the optimizer's step."""
        return 0 if self.stage == 3 else self.gradient_itemsize * self._part(count)

    def buckets(self) -> int:
        """That are there in backward alone."""
        return self.num_buckets * self.bucket_bytes if self.stage in (1, 2) else 0

    def step(self, count: int, fused: bool) -> int:
        """In the optimizer's step: gradients in fp32, and what an optimizer without a kernel of its own forms on the way."""
        if self.offloads_optimizer:
            return 0
        part = FULL * self._part(count)
        return part if fused or self.stage == 0 else part * (1 + MOMENTS)

    def _part(self, count: int) -> int:
        return -(-count // self.num_ranks) if self.stage else count


@dataclass(frozen=True)
class DraftStates:
    """What a micro-batch leaves in memory between forward and backward, and what backward needs on top.

    itemsize: bytes of a number. fused: whether liger-kernel's norms and SwiGLU run, which keep less than PyTorch's, and a loss
    that works in place. recompute: `ttt.recompute`.
    """

    shape: DraftShape
    counts: StepCounts
    loss: LossSection
    itemsize: int
    fused: bool
    recompute: str = "none"

    def kept(self) -> int:
        """From the last forward operation to the first backward one: states of all rows, and the gradients of the loss."""
        size = self.shape.hidden_size
        rows = self.counts.num_loss_rows
        normed = rows * size * (self.itemsize if self.fused else 2 * FULL)
        head = size * self.shape.draft_vocab_size * getattr(torch, self.loss.gradient_dtype).itemsize
        states = sum(self._of_layer(layer) for layer in range(self.shape.num_layers))
        fused_TD = self.counts.num_tokens * size * self.itemsize  # what `fc` gives
        return states + fused_TD + normed + rows * size * self.itemsize + head

    def on_top(self) -> int:
        """The most that a chunk of the loss, or a part of the backward pass, forms beyond them."""
        size = self.shape.hidden_size
        rows = self.counts.num_loss_rows
        most = max(self.counts.rows_S, default=0)
        head = size * self.shape.draft_vocab_size * self.itemsize  # its gradient in the weights' precision
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
        a_slot = Walk(in_place=self.fused).bytes_per_slot(len(self.counts.rows_S), self.shape.draft_vocab_size, dtype)
        return min(limit, self.counts.num_slots * a_slot)

    def _of_layer(self, layer: int) -> int:
        counts = self.counts
        last = layer == self.shape.num_layers - 1
        asking = (counts.rows_S[0] if last else counts.num_tokens) + sum(counts.rows_S[1:])
        giving = counts.num_tokens + sum(counts.rows_S[1:])
        if self.recompute == "step":
            return asking * self.shape.hidden_size * self.itemsize + giving * self._key_value_row()
        picked = asking < giving  # then queries read a copy of the chosen rows
        copied = counts.rows_S[0] * self._input_size(layer) * self.itemsize if picked else 0
        return giving * self._key_row(layer) + asking * self._query_row(self.recompute) + copied

    def _input_size(self, layer: int) -> int:
        return self.shape.hidden_size * (2 if layer == 0 else 1)

    def _key_value_row(self) -> int:
        return 2 * self.shape.num_groups * self.shape.head_dim * self.itemsize

    def _key_row(self, layer: int) -> int:
        """Of a row that gives a key: normed inputs, and what the norms keep; its key and value; its rotary angles."""
        size = self.shape.hidden_size
        inputs = self._input_size(layer)
        norms = inputs * self.itemsize if self.fused else size * FULL * (3 if layer == 0 else 2)
        return inputs * self.itemsize + norms + self._key_value_row() + 2 * self.shape.head_dim * FULL

    def _query_row(self, recompute: str) -> int:
        """Of a row that asks: query, output and log-sum-exp, then the MLP's."""
        attended = 2 * self.shape.num_heads * self.shape.head_dim * self.itemsize + self.shape.num_heads * FULL
        return attended + (self.shape.hidden_size * self.itemsize if recompute == "mlp" else self._mlp_row())

    def _mlp_row(self) -> int:
        size = self.shape.hidden_size
        width = self.shape.intermediate_size
        norm = size * self.itemsize if self.fused else 2 * size * FULL
        return norm + (size + (3 if self.fused else 4) * width) * self.itemsize
