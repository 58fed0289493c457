"""Lower bounds of a training step of a block drafter.

Attention scores, logits and the inner states of MLPs need not exist in memory. `fc` has no input
gradient, since the target's states are frozen, and the head has no weight gradient.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from engine.batch import PackedBatch
from engine.kernels import BlockRows
from engine.models.block_drafter.block_config import BlockConfig
from engine.models.block_drafter.block_rows import BlockShape, plan_blocks
from engine.models.costs import Cost, StepPart, attention_part, frozen_head_part, map_part


@dataclass(frozen=True)
class BlockCounts:
    """Work of a training step on a micro-batch.

    num_tokens: T. num_context: context tokens that a block sees. num_blocks: N.
    num_rows: rows of all blocks. num_loss_rows: rows with loss. rows_S: rows with loss of each prediction.
    num_leading_rows: rows that are not behind the last row with loss of their block.
    pairs_of_layers: for each layer, pairs of a row and a key that it sees, of all rows.
    last_pairs, leading_pairs: pairs of the rows with loss in the last layer, and of the leading rows.
    prefix_pairs: pairs of a token and an earlier token of its document, or the token itself.
    num_slots: slots whose target distribution is computed.
    """

    num_tokens: int
    num_context: int
    num_blocks: int
    num_rows: int
    num_loss_rows: int
    num_leading_rows: int
    rows_S: tuple[int, ...]
    pairs_of_layers: tuple[int, ...]
    last_pairs: int
    leading_pairs: int
    prefix_pairs: int
    num_slots: int
    block_size: int

    @classmethod
    def needed(cls, batch: PackedBatch, allowed_ST: Tensor, shape: BlockShape, num_slots: int) -> "BlockCounts":
        """Return the counts of the rows that a loss depends on. allowed_ST: bool [S, T], rows with loss."""
        plan = plan_blocks(batch, allowed_ST, shape)
        seen_of_layers = [_seen_keys(rows) for rows in plan.layers]
        last_seen_P = seen_of_layers[-1]
        return cls(
            num_tokens=batch.num_tokens,
            num_context=batch.num_tokens if plan.context_C is None else len(plan.context_C),
            num_blocks=len(plan.anchor_N),
            num_rows=plan.num_rows,
            num_loss_rows=len(plan.loss_row_R),
            num_leading_rows=len(plan.leading_row_Q),
            rows_S=tuple(allowed_ST.sum(1).tolist()),
            pairs_of_layers=tuple(int(seen_P.sum()) for seen_P in seen_of_layers),
            last_pairs=int(last_seen_P[plan.loss_row_R].sum()),
            leading_pairs=int(last_seen_P[plan.leading_row_Q].sum()),
            prefix_pairs=int((batch.position_T + 1).sum()),
            num_slots=num_slots,
            block_size=shape.block_size,
        )

    def without_compaction(self) -> "BlockCounts":
        """Return the counts if every row of every block is computed and has a head, and every token is context."""
        num_rows = self.num_blocks * self.block_size
        share = num_rows / max(1, self.num_rows)
        pairs = tuple(round(count * share) for count in self.pairs_of_layers)
        return replace(
            self,
            num_context=self.num_tokens,
            num_rows=num_rows,
            num_loss_rows=num_rows,
            num_leading_rows=num_rows,
            rows_S=(self.num_blocks,) * len(self.rows_S),
            pairs_of_layers=pairs,
            last_pairs=pairs[-1],
            leading_pairs=pairs[-1],
        )

    def last_layer_rows(self, mixed_rows: int) -> int:
        """Return the number of rows that have an output of the last layer. mixed_rows: as in `block_step_parts`."""
        return self.num_leading_rows if mixed_rows else self.num_loss_rows


def _seen_keys(rows: BlockRows) -> Tensor:
    """Return the number of keys that each row sees in a layer, int64 [P]."""
    return rows.context_end_Q - rows.context_begin_Q + rows.own_end_Q - rows.own_begin_Q


def block_step_parts(
    config: BlockConfig, counts: BlockCounts, needs_distribution: bool, needs_head_stats: bool, mixed_rows: int = 0
) -> dict[str, StepPart]:
    """Return the parts of one training step that all methods have, with the target's head but not its layers.

    needs_distribution, needs_head_stats: as the properties of the method.
    mixed_rows: rows of a block that a method mixes into each row, including itself; 0 = none. If rows
        are mixed, those before a row with loss run in the last layer too.
    """
    size = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    aux_size = len(config.aux_layers) * size
    parts = {"fc": map_part(counts.num_context, aux_size, aux_size * size, size, input_gradient=False)}
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    last = config.num_hidden_layers - 1
    for layer, pairs in enumerate(counts.pairs_of_layers):
        num_rows = counts.num_rows
        num_pairs = pairs
        if layer == last:
            num_rows = counts.last_layer_rows(mixed_rows)
            num_pairs = counts.leading_pairs if mixed_rows else counts.last_pairs
        num_inputs = counts.num_rows
        if layer == 0:
            num_inputs = first_layer_inputs(counts, mixed_rows)
        num_asking = min(num_inputs, num_rows)
        own = {
            "context": map_part(counts.num_context, size, size * keys, keys),
            "qkv": map_part(num_asking, size, size * queries, queries) + map_part(num_inputs, size, size * keys, keys),
            "attention": attention_part(num_rows, counts.num_context + counts.num_rows, num_pairs, heads),
            "o": map_part(num_rows, queries, queries * size, size),
            "mlp": map_part(num_rows, size, 3 * size * config.intermediate_size, size),
        }
        for name, part in own.items():
            parts[name] = parts.get(name, StepPart(Cost())) + part
    parts["head"] = frozen_head_with_gradient(counts.num_loss_rows, size, config.vocab_size)
    if needs_distribution:
        parts["teacher"] = frozen_head_part(counts.num_slots, size, config.vocab_size)
    if needs_head_stats:
        parts["target_head"] = frozen_head_part(counts.num_slots, size, config.vocab_size)
    return parts


def first_layer_inputs(counts: BlockCounts, mixed_rows: int) -> int:
    """Return the number of different rows that enter the first layer's attention.

    The mask rows have one input. Where `mixed_rows` rows are mixed, the first rows of a block differ.
    """
    return min(counts.num_rows, counts.num_blocks * max(1, mixed_rows) + 1)


def frozen_head_with_gradient(num_rows: int, size: int, vocab_size: int) -> StepPart:
    """Return the cost of a frozen head and its loss: logits, and the gradient of the head's input."""
    once = Cost(2 * num_rows * size * vocab_size, (num_rows + vocab_size) * size)
    return StepPart(once, once)
