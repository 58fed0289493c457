"""Memory of the activations of a block drafter in a training step.

Only tensors that are in memory at the same time are counted, without the allocator's overhead, the
plan of the rows, statistics of the loss, and the gradients of weights.
"""

from dataclasses import dataclass

from engine.config.sections import CHUNK_MB
from engine.kernels.token_loss import ENOUGH_ROWS, PIECE_BYTES
from engine.models.block_drafter.block_config import BlockConfig
from engine.models.block_drafter.block_costs import BlockCounts, first_layer_inputs
from engine.models.costs import FULL
from engine.models.draft_method import ActivationBytes


@dataclass(frozen=True)
class OwnStates:
    """Numbers that a method's own modules keep, in addition to those of the shared network.

    before_attention: per row that attention projects. after_attention, around_mlp: per row with an output.
    head: per row with loss. head_weights: whatever the number of rows, in fp32.
    head_passing: per row with loss, while the head's loss of a chunk of rows is computed.
    has_bias: whether a bias is added to the logits.
    """

    before_attention: int = 0
    after_attention: int = 0
    around_mlp: int = 0
    head: int = 0
    head_weights: int = 0
    head_passing: int = 0
    has_bias: bool = False


@dataclass(frozen=True)
class BlockStates:
    """Activation memory of a micro-batch, in the forward pass and in the backward pass.

    own: what the method adds. mixed_rows: as in `block_step_parts`.
    itemsize: bytes of a number. fused: whether GPU kernels run.
    recompute, chunk_mb: the options `block.recompute` and `loss.chunk_mb`.
    needs_distribution: whether the loss reads the target's distribution.
    """

    config: BlockConfig
    counts: BlockCounts
    own: OwnStates
    mixed_rows: int
    itemsize: int
    fused: bool
    recompute: str
    chunk_mb: int | None
    needs_distribution: bool

    def bytes(self) -> ActivationBytes:
        """Return what is kept, and the most that is added to it."""
        return ActivationBytes(self.kept(), self.on_top())

    def kept(self) -> int:
        """Return the bytes in memory between the forward and the backward pass."""
        layers = range(self.config.num_hidden_layers)
        return self._shared() + sum(self._kept_of_layer(layer) for layer in layers) + self._kept_of_head()

    def on_top(self) -> int:
        """Return the most bytes that the loss or the backward pass of a layer adds to what is kept.

        The backward pass of a layer begins when what later layers kept is no longer in memory.
        """
        size = self.config.hidden_size
        most = self._loss()
        freed = self._kept_of_head()
        for layer in reversed(range(self.config.num_hidden_layers)):
            # Gradients of the states, and in an MLP of the inner states and of what SwiGLU computes again.
            passing = (2 if self.fused else 3) * self.config.intermediate_size + 3 * size
            added = self._outputs(layer) * passing * self.itemsize + self._again(layer)
            most = max(most, added - freed)
            freed += self._kept_of_layer(layer)
        return most

    @property
    def _key_size(self) -> int:
        return self.config.num_key_value_heads * self.config.head_dim

    def _outputs(self, layer: int) -> int:
        """Return the number of rows that have an output of a layer."""
        is_last = layer == self.config.num_hidden_layers - 1
        return self.counts.last_layer_rows(self.mixed_rows) if is_last else self.counts.num_rows

    def _shared(self) -> int:
        """Return the bytes that all layers share: the context vectors and the rotary angles."""
        counts = self.counts
        vectors = 2 * self.config.hidden_size
        if counts.num_context < counts.num_tokens:
            # The states of the context are copied, and `fc` keeps the copy.
            vectors += len(self.config.aux_layers) * self.config.hidden_size
        angles = counts.num_context + counts.num_rows
        last = self._outputs(self.config.num_hidden_layers - 1)
        if last < counts.num_rows:
            angles += last
        return counts.num_context * vectors * self.itemsize + angles * 2 * self.config.head_dim * FULL

    def _kept_of_layer(self, layer: int) -> int:
        size = self.config.hidden_size
        if self.recompute == "layer":
            num_inputs = self.counts.num_rows if layer else self.counts.num_blocks
            return num_inputs * size * self.itemsize
        state = self._outputs(layer) * size * self.itemsize
        mlp = 0 if self.recompute == "mlp" else self._mlp(layer)
        return self._attention(layer) + state + mlp

    def _again(self, layer: int) -> int:
        """Return the bytes that the backward pass of a layer computes again before it uses them."""
        if self.recompute == "mlp":
            return self._mlp(layer)
        if self.recompute == "layer":
            state = self._outputs(layer) * self.config.hidden_size * self.itemsize
            return self._attention(layer) + state + self._mlp(layer) - self._kept_of_layer(layer)
        return 0

    def _attention(self, layer: int) -> int:
        """Return the bytes that the attention of a layer keeps, with its inputs."""
        config = self.config
        counts = self.counts
        size = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = self._key_size
        num_outputs = self._outputs(layer)
        num_inputs = counts.num_rows
        num_asking = num_outputs
        if layer == 0:
            num_inputs = first_layer_inputs(counts, self.mixed_rows)
            num_asking = num_inputs
        # State, normed state, and the key before its norm.
        numbers = num_inputs * (2 * size + keys + self.own.before_attention)
        # Key with rotary embedding, and value.
        numbers += counts.num_rows * 2 * keys
        # Query before its norm, query with rotary embedding, and output.
        numbers += num_asking * queries + num_outputs * (2 * queries + self.own.after_attention)
        if layer and num_outputs < counts.num_rows:
            # The inputs of the queries are copied.
            numbers += num_outputs * size
        numbers += counts.num_context * 3 * keys
        scales = num_inputs * (1 + config.num_key_value_heads) + num_asking * config.num_attention_heads
        scales += counts.num_context * config.num_key_value_heads
        if self.fused:
            # Log-sum-exp of the scores.
            scales += num_outputs * config.num_attention_heads
        return numbers * self.itemsize + scales * FULL

    def _mlp(self, layer: int) -> int:
        """Return the bytes that the MLP of a layer keeps, without its input."""
        inner = (3 if self.fused else 2) * self.config.intermediate_size
        numbers = self.config.hidden_size + inner + self.own.around_mlp
        return self._outputs(layer) * (numbers * self.itemsize + FULL)

    def _kept_of_head(self) -> int:
        """Return the bytes that are kept of rows with loss: the input of the last norm, and the gradient of its output."""
        numbers = 2 * self.config.hidden_size + self.own.head
        return self.counts.num_loss_rows * numbers * self.itemsize + self.own.head_weights * FULL

    def _loss(self) -> int:
        """Return the bytes of the final states and of a chunk of the loss: logits, their bias and, in fp32, the target's."""
        device = "cuda" if self.fused else "cpu"
        limit = (self.chunk_mb or CHUNK_MB[device]) << 20
        num_rows = self.counts.num_loss_rows
        row_bytes = self.config.vocab_size * (2 if self.own.has_bias else 1) * self.itemsize
        if self.needs_distribution:
            row_bytes += self.config.vocab_size * FULL
        chunk_rows = min(max(1, limit // row_bytes), ENOUGH_ROWS[device], num_rows)
        logits = chunk_rows * row_bytes
        if self.needs_distribution and not self.fused:
            # Both distributions, their difference and the target's logits of a piece of the chunk.
            logits += 4 * min(PIECE_BYTES[device], chunk_rows * self.config.vocab_size * FULL)
        of_head = min(limit, num_rows * self.own.head_passing * self.itemsize)
        return num_rows * self.config.hidden_size * self.itemsize + max(logits, of_head)
