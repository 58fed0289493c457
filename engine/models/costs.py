"""Lower bounds of work on given hardware: FLOPs, memory traffic and time.

A FLOP is one multiplication or one addition: a product [M, K] x [K, N] takes 2 M K N. Element-wise
work is not counted. A part reads each input and weight once per pass and writes each output and
gradient once.
"""

from dataclasses import dataclass

import torch

FULL = 4  # bytes of an fp32 number


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
