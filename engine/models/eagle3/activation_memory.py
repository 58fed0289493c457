"""Memory of the activations of an EAGLE-3 draft in a training step.

Only tensors that are in memory at the same time are counted, without the allocator's overhead.
"""

from dataclasses import dataclass

import torch

from engine.config.sections import CHUNK_MB, LossSection
from engine.kernels.vocab_loss import LossPass
from engine.models.costs import FULL
from engine.models.eagle3.flops import DraftShape, StepCounts
from engine.models.losses.loss_registry import make_loss


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
