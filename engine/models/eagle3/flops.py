"""Lower bounds of a training step of an EAGLE-3 draft, in FLOPs and memory traffic.

Parts are counted over all TTT steps together. Logits, the MLP's inner states and attention scores
need not exist in memory at all. The following work is not counted, since a step can avoid it:

- `fc` and the token embedding's half of q, k and v multiply frozen inputs, so they have no input
  gradient. A norm before them does not need it for its own weight `w` either: with `W` the weight
  of the linear map, the gradient of `w` is `(W * dW).sum(0) / w`.
- Rows `(t, i)` with equal `t + i` read the same token. The embedding's half of their q, k and v is
  computed once, and so is the gradient of its weight, from the sum of the rows' gradients. If
  `(t, i)` runs, so does `(t + i, 0)`, since its chain learns the same slots. Step 0 therefore
  contains every token that provides a query. All tokens provide keys at step 0, so it also contains
  every token that provides a key.
"""

from dataclasses import dataclass, replace

import torch

from engine.batch import PackedBatch
from engine.models.costs import Cost, StepPart, attention_part, frozen_head_part, head_part, map_part

NUM_AUX = 3  # auxiliary layers that a draft reads


@dataclass(frozen=True)
class DraftShape:
    """Sizes of a draft (in order D, F, H, G, E and U) and of the target that it reads (D and V)."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    draft_vocab_size: int
    target_hidden_size: int
    target_vocab_size: int
    num_layers: int = 1


@dataclass(frozen=True)
class StepCounts:
    """Number of rows, slots and attended keys in one training step of a micro-batch.

    num_tokens: T.
    rows_S: rows of each TTT step.
    pairs_S: pairs of a row and a key that it attends to, of each TTT step.
    prefix_pairs: pairs of step 0 if every token is a query, as in all layers but the last.
    num_loss_rows: R.
    num_slots: slots that the target's head reads.
    num_learned: slots that at least one row learns.
    """

    num_tokens: int
    rows_S: tuple[int, ...]
    pairs_S: tuple[int, ...]
    prefix_pairs: int
    num_loss_rows: int
    num_slots: int
    num_learned: int

    @classmethod
    def needed(cls, batch: PackedBatch, carries_loss_ST: torch.Tensor, num_slots: int) -> "StepCounts":
        """Return the counts of the rows that a loss depends on.

        carries_loss_ST: bool [S, T], rows with loss. num_slots: slots that the target's head reads.
        """
        alive_ST = carries_loss_ST.flip(0).cummax(0).values.flip(0)
        seen_T = batch.position_T + 1
        steps = range(carries_loss_ST.shape[0])
        return cls(
            num_tokens=batch.num_tokens,
            rows_S=tuple(alive_ST.sum(1).tolist()),
            pairs_S=tuple(int(((seen_T + step) * alive_ST[step]).sum()) for step in steps),
            prefix_pairs=int(seen_T.sum()),
            num_loss_rows=int(carries_loss_ST.sum()),
            num_slots=num_slots,
            # If any row learns slot u, so does row (u - 1, 0). Step 0 therefore has one row per slot.
            num_learned=int(carries_loss_ST[0].sum()),
        )

    def without_compaction(self) -> "StepCounts":
        """Return the counts of the same micro-batch when every row of every TTT step is computed."""
        steps = len(self.rows_S)
        num_tokens = self.num_tokens
        pairs_S = tuple(self.prefix_pairs + step * num_tokens for step in range(steps))
        return replace(self, rows_S=(num_tokens,) * steps, pairs_S=pairs_S)


def step_parts(shape: DraftShape, counts: StepCounts) -> dict[str, StepPart]:
    """Return the parts of one draft training step, with the target's head but not its layers."""
    size = shape.hidden_size
    target_size = shape.target_hidden_size
    aux_size = NUM_AUX * target_size
    parts = {"fc": map_part(counts.num_tokens, aux_size, aux_size * size, size, input_gradient=False)}
    if size != target_size:
        parts["embed_projection"] = StepPart(map_part(counts.num_tokens, target_size, target_size * size, size).forward)
    for layer in range(shape.num_layers):
        for name, part in _layer_parts(shape, counts, layer).items():
            parts[name] = parts.get(name, StepPart(Cost())) + part
    parts["head"] = head_part(counts.num_loss_rows, size, shape.draft_vocab_size)
    parts["teacher"] = frozen_head_part(counts.num_learned, target_size, shape.draft_vocab_size)
    parts["target_head"] = frozen_head_part(counts.num_slots, target_size, shape.target_vocab_size)
    return parts


def _layer_parts(shape: DraftShape, counts: StepCounts, layer: int) -> dict[str, StepPart]:
    """Return the parts of one decoder layer.

    Layers below the last run step 0 for every token, because the next layer needs a key of each.
    """
    size = shape.hidden_size
    is_last = layer == shape.num_layers - 1
    query_size = shape.num_heads * shape.head_dim
    key_value_size = 2 * shape.num_groups * shape.head_dim
    asking = counts.rows_S[0] if is_last else counts.num_tokens
    num_pairs = (counts.pairs_S[0] if is_last else counts.prefix_pairs) + sum(counts.pairs_S[1:])
    later = sum(counts.rows_S[1:])
    num_rows = asking + later
    num_keys = counts.num_tokens + later
    qkv = map_part(num_rows, size, size * query_size, query_size)
    qkv += map_part(num_keys, size, size * key_value_size, key_value_size)
    if layer == 0:  # the embedding's half is accumulated into the state's, so it writes no output
        qkv += map_part(asking, size, size * query_size, 0, input_gradient=False)
        qkv += map_part(counts.num_tokens, size, size * key_value_size, 0, input_gradient=False)
    return {
        "qkv": qkv,
        "attention": attention_part(num_rows, num_keys, num_pairs, (shape.num_heads, shape.num_groups, shape.head_dim)),
        "o": map_part(num_rows, query_size, query_size * size, size),
        "mlp": map_part(num_rows, size, 3 * size * shape.intermediate_size, size),
    }
