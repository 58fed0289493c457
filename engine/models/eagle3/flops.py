"""Lower bounds of a draft training step: FLOPs, memory traffic and time on given hardware.

A FLOP is one multiplication or one addition: a product [M, K] x [K, N] takes 2 M K N. Element-wise
work is not counted. A part reads each input and weight once per pass and writes each output and
gradient once, over all TTT steps together. Logits, the MLP's inner states and attention scores need
not exist in memory at all. The following work is not counted, since a step can avoid it:

- `fc` and the token embedding's half of q, k and v multiply frozen inputs, so they have no input
  gradient. A norm before them does not need it for its own weight `w` either: with `W` the weight
  of the linear map, the gradient of `w` is `(W * dW).sum(0) / w`.
- Rows `(t, i)` with equal `t + i` read the same token. The embedding's half of their q, k and v is
  computed once, and so is the gradient of its weight, from the sum of the rows' gradients. If
  `(t, i)` runs, so does `(t + i, 0)`, since its chain learns the same slots. Step 0 therefore
  contains every token that provides a query. All tokens provide keys at step 0, so it also contains
  every token that provides a key.
"""

from dataclasses import dataclass

import torch

from engine.batch import PackedBatch


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
    num_aux: int = 3


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


@dataclass(frozen=True)
class Cost:
    """FLOPs and memory traffic of a piece of work.

    elements: numbers read from memory or written to it; weights, states and gradients share a
        dtype.
    """

    flops: int = 0
    elements: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.elements + other.elements)

    def bytes(self, dtype: torch.dtype) -> int:
        return self.elements * dtype.itemsize

    def floor_s(self, peak: "HardwarePeak", dtype: torch.dtype) -> float:
        return max(self.flops / peak.flops_per_s[dtype], self.bytes(dtype) / peak.bytes_per_s)


@dataclass(frozen=True)
class StepPart:
    """Cost of one part of a training step, for the forward and the backward pass."""

    forward: Cost
    backward: Cost = Cost()

    def __add__(self, other: "StepPart") -> "StepPart":
        return StepPart(self.forward + other.forward, self.backward + other.backward)

    @property
    def flops(self) -> int:
        return self.forward.flops + self.backward.flops


def map_part(num_rows: int, num_in: int, num_weights: int, num_out: int, input_gradient: bool = True) -> StepPart:
    """Return the cost of a trained linear map of rows, or of a chain of linear maps.

    num_weights: total number of weights. Inner states of a chain stay on the chip.
    input_gradient: whether the backward pass computes a gradient of the input.
    """
    flops = 2 * num_rows * num_weights
    read = num_rows * num_in
    written = num_rows * num_out
    once = Cost(flops, read + num_weights + written)  # cost of forward, and of the weight gradient
    return StepPart(once, once + Cost(flops, num_weights + read) if input_gradient else once)


def attention_part(num_rows: int, num_keys: int, num_pairs: int, heads: tuple[int, int, int]) -> StepPart:
    """Return the cost of attention. heads: (H, G, E).

    For each pair of row and key, the forward pass takes two products, for scores and outputs; the
    backward pass takes four. A kernel that stores no scores recomputes them in its backward pass; a
    lower bound does not count this fifth product.
    """
    num_heads, num_groups, head_dim = heads
    flops = 4 * num_pairs * num_heads * head_dim
    queries = num_rows * num_heads * head_dim
    keys_and_values = 2 * num_keys * num_groups * head_dim
    return StepPart(Cost(flops, 2 * queries + keys_and_values), Cost(2 * flops, 4 * queries + 2 * keys_and_values))


def head_part(num_rows: int, size: int, vocab_size: int) -> StepPart:
    """Return the cost of the draft's head and the loss together.

    The backward pass writes the gradients of the tensors that the forward pass reads.
    """
    flops = 2 * num_rows * size * vocab_size
    once = (num_rows + vocab_size) * size
    return StepPart(Cost(flops, once), Cost(2 * flops, once))


def frozen_head_part(num_slots: int, size: int, vocab_size: int) -> StepPart:
    """Return the cost of a head of the target, which has a forward pass only."""
    return StepPart(Cost(2 * num_slots * size * vocab_size, (num_slots + vocab_size) * size))


def step_parts(shape: DraftShape, counts: StepCounts) -> dict[str, StepPart]:
    """Return the parts of one draft training step, with the target's head but not its layers."""
    size = shape.hidden_size
    target_size = shape.target_hidden_size
    aux_size = shape.num_aux * target_size
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


@dataclass(frozen=True)
class HardwarePeak:
    """Peak rates of a device.

    flops_per_s: FLOP/s of dense matrix products, by dtype of the operands.
    bytes_per_s: memory bandwidth in bytes/s.
    """

    name: str
    flops_per_s: dict[torch.dtype, float]
    bytes_per_s: float


def _peak(name: str, half: float, full: float, terabytes_per_s: float) -> HardwarePeak:
    rates = {torch.bfloat16: half * 1e12, torch.float16: half * 1e12, torch.float32: full * 1e12}
    return HardwarePeak(name, rates, terabytes_per_s * 1e12)


# Source: NVIDIA's datasheets "H100 Tensor Core GPU" and "H200 Tensor Core GPU" (SXM columns), "A100
# Tensor Core GPU", and "DGX B200" (an eighth of it). Figures with sparsity are halved; float32 is
# without TF32, which is PyTorch's default.
PEAKS = {
    peak.name: peak
    for peak in (
        _peak("NVIDIA H100 80GB HBM3", 989.4, 66.9, 3.35),
        _peak("NVIDIA H200", 989.4, 66.9, 4.8),
        _peak("NVIDIA A100-SXM4-40GB", 312, 19.5, 1.555),
        _peak("NVIDIA A100-SXM4-80GB", 312, 19.5, 2.039),
        _peak("NVIDIA B200", 2250, 75, 8.0),
    )
}


def peak_of(device: torch.device) -> HardwarePeak:
    """Return the peak rates of a known GPU by its name. Raises ValueError for any other device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if name not in PEAKS:
        raise ValueError(f"no datasheet for {name!r}; known are {sorted(PEAKS)}; measure its rates, or add them here")
    return PEAKS[name]


def floor_s(parts: dict[str, StepPart], peak: HardwarePeak, dtype: torch.dtype) -> float:
    """Return the least time of all parts in sequence, in seconds.

    Each pass of each part is bound by its FLOPs or by its bytes.
    """
    return sum(part.forward.floor_s(peak, dtype) + part.backward.floor_s(peak, dtype) for part in parts.values())
