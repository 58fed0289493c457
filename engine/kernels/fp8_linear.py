"""Rows times the transposes of experts' fp8 weights, dequantised tile by tile on the chip.

A plain linear map is the case of one expert. M rows sorted by expert, X experts, K inputs, N
outputs. A weight has a scale for every block of b rows and c columns; the last blocks of both may
be smaller. Let e be the expert of row m, and let `round` round to the precision of the rows:

    weight[e, n, k] = round(fp32(codes[e, n, k]) * scale[e, n // b, k // c])
    out[m, n]       = round(sum_k rows[m, k] weight[e, n, k])            the sum in fp32

The result equals the product with a weight dequantised beforehand, apart from the order of the sum.
A weight is read from memory at one byte per value. This pays when reading the weight takes most of
the time, that is, with few rows per expert. With many rows, the tensor cores at the precision of
the rows are the limit, as they are for a dense weight.

A program computes a tile of the transpose, weight [N, K] times rows [K, M], because the dequantised
weight lies in registers and Hopper's tensor cores read only the left operand from there. A tile
holds rows of one expert, so there are at most M // BLOCK_M + X tiles of rows. The device finds the
expert of a tile from the ends of the experts' rows; programs after the last tile do nothing.

The number of rows per weight decides between three methods. A medium number runs as above. With few
rows, the tiles of outputs do not fill a GPU, so K is split: each part's sums go to memory in fp32,
and one more launch adds them in a fixed order. With many rows, a weight would be dequantised once
for every tile of rows. It is instead dequantised once into scratch memory, which the next product
reuses, and multiplied by cuBLAS or by PyTorch's grouped products.

Decoding places the bits of an e4m3 number (bias 7) into those of an fp32 number (bias 127): the
sign, four bits of exponent and, from bit 22 down, three bits of fraction. A factor of 2**120
corrects the bias and is exact for subnormal values too. GPUs before compute capability 8.9 decode
this way. They decode NaN, which published weights do not contain, as 480.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Estimates from a roofline count; none of them has been measured on a GPU.
FEW_ROWS, LEAST_PART = 64, 512  # rows per weight up to which K is split, into parts of so many inputs
PROGRAMS = 264  # programs that splitting aims at: two per multiprocessor of an H100
MANY_ROWS = 1024  # rows per weight from which dequantising it once pays
MAX_SCRATCH_BYTES = 1 << 30  # larger weights are dequantised on the chip, however many rows there are
ROWS_TOGETHER = 8  # tiles of rows that share outputs at a time, so that both operands stay in L2

_SIGN_EXPONENT_FRACTION = tl.constexpr(-(1 << 31) + (((1 << 7) - 1) << 20))
_OF_BIAS = tl.constexpr(2.0**120)


@triton.jit
def decode(codes):
    """Convert e4m3 codes, given as fp8 or as bytes, to fp32."""
    if codes.dtype == tl.float8e4nv:
        return codes.to(tl.float32)
    spread = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & _SIGN_EXPONENT_FRACTION
    return spread.to(tl.float32, bitcast=True) * _OF_BIAS


@triton.jit
def _rows_of(tile, ends_X, X: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the expert of a tile of rows, the tile's first row, and the end of the expert's rows.

    The expert is at least X if the tile does not exist.
    """
    x_B = tl.arange(0, BLOCK_X)
    end_B = tl.load(ends_X + x_B, mask=x_B < X, other=0)
    start_B = tl.load(ends_X + x_B - 1, mask=(x_B > 0) & (x_B < X), other=0)
    tiles_B = tl.where(x_B < X, tl.cdiv(end_B - start_B, BLOCK_M), 0)
    expert = tl.sum((tl.cumsum(tiles_B, 0) <= tile).to(tl.int32), 0)
    tile -= tl.sum(tl.where(x_B < expert, tiles_B, 0), 0)
    start = tl.sum(tl.where(x_B == expert, start_B, 0), 0)
    end = tl.sum(tl.where(x_B == expert, end_B, 0), 0)
    return expert.to(tl.int64), start + tile * BLOCK_M, end


@triton.jit
def tile_of(
    ends_X, num_rows, row_tiles, X: tl.constexpr, N: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Locate the tile of a program.

    Returns its expert, its first row, the end of the expert's rows, and its first output. The
    expert is at least X if the program has no tile.
    """
    program = tl.program_id(0)
    first_tile = program // (TOGETHER * tl.cdiv(N, BLOCK_N)) * TOGETHER
    beside = tl.minimum(row_tiles - first_tile, TOGETHER)
    within = program % (TOGETHER * tl.cdiv(N, BLOCK_N))
    tile = first_tile + within % beside
    expert = tl.full([], 0, tl.int64)
    first_row = tile * BLOCK_M
    end = num_rows
    if ends_X is not None:
        expert, first_row, end = _rows_of(tile, ends_X, X, BLOCK_X, BLOCK_M)
    return expert, first_row, end, within // beside * BLOCK_N


@triton.jit(do_not_specialize=["num_rows", "row_tiles"])
def _product_kernel(
    rows_MK, codes_XNK, scale_XGJ, ends_X, out_MN,
    rows_stride, codes_stride_x, codes_stride_n, codes_stride_k, scale_stride_x, scale_stride_g, scale_stride_j,
    num_rows, row_tiles,
    X: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    expert, first_row, end, first_output = tile_of(ends_X, num_rows, row_tiles, X, N, BLOCK_X, BLOCK_M, BLOCK_N, TOGETHER)
    if expert >= X:
        return
    part = tl.program_id(1)
    first_input = 0 if PART >= K else part * PART
    stop = K if PART >= K else tl.minimum(first_input + PART, K)
    m_M = first_row + tl.arange(0, BLOCK_M)
    n_N = first_output + tl.arange(0, BLOCK_N)
    # Past the ends, the last row, output or input is read again: a mask would cost registers.
    rows_1M = rows_MK + tl.minimum(m_M, num_rows - 1).to(tl.int64)[None, :] * rows_stride
    near_N1 = tl.minimum(n_N, N - 1).to(tl.int64)[:, None]
    codes_N1 = codes_XNK + expert * codes_stride_x + near_N1 * codes_stride_n
    scale_N1 = scale_XGJ + expert * scale_stride_x + near_N1 // BLOCK_ROWS * scale_stride_g
    sum_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(first_input, stop, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        near_1K = k_K[None, :]
        if K % BLOCK_K == 0:
            rows_KM = tl.load(rows_1M + k_K[:, None])
        else:
            rows_KM = tl.load(rows_1M + k_K[:, None], mask=k_K[:, None] < K, other=0.0)
            near_1K = tl.minimum(near_1K, K - 1)
        codes_NK = tl.load(codes_N1 + near_1K * codes_stride_k)
        if BLOCK_COLUMNS % BLOCK_K == 0:
            scale_NK = tl.load(scale_N1 + start // BLOCK_COLUMNS * scale_stride_j)
        else:
            scale_NK = tl.load(scale_N1 + near_1K // BLOCK_COLUMNS * scale_stride_j)
        weight_NK = (decode(codes_NK) * scale_NK).to(rows_KM.dtype)
        sum_NM = tl.dot(weight_NK, rows_KM, sum_NM, input_precision="ieee")
    out_NM = out_MN + (part.to(tl.int64) * num_rows + m_M.to(tl.int64))[None, :] * N + n_N[:, None]
    tl.store(out_NM, sum_NM.to(out_MN.dtype.element_ty), mask=(m_M[None, :] < end) & (n_N[:, None] < N))


@triton.jit
def _dequantise_kernel(
    codes_XNK, scale_XGJ, weight_XNK,
    codes_stride_x, codes_stride_n, codes_stride_k, scale_stride_x, scale_stride_g, scale_stride_j,
    N: tl.constexpr, K: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    tiles_k = tl.cdiv(K, BLOCK_K)
    n_N1 = (tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k_1K = (tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    exists_NK = (n_N1 < N) & (k_1K < K)
    codes_NK = codes_XNK + expert * codes_stride_x + n_N1 * codes_stride_n + k_1K * codes_stride_k
    scale_NK = (
        scale_XGJ + expert * scale_stride_x + n_N1 // BLOCK_ROWS * scale_stride_g + k_1K // BLOCK_COLUMNS * scale_stride_j
    )
    weight_NK = decode(tl.load(codes_NK, mask=exists_NK)) * tl.load(scale_NK, mask=exists_NK, other=0.0)
    to_NK = weight_XNK + (expert * N + n_N1) * K + k_1K
    tl.store(to_NK, weight_NK.to(weight_XNK.dtype.element_ty), mask=exists_NK)


class Scratch:
    """Scratch memory for one dequantised weight per device, stream and precision.

    It grows on demand and is never freed. Products on one stream run one after another, so a
    product may overwrite the weight of the previous one.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialised memory of this shape."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = device, stream, dtype
        size = shape.numel()
        if key not in self._memory or self._memory[key].numel() < size:
            self._memory[key] = torch.empty(size, dtype=dtype, device=device)
        return self._memory[key][:size].view(shape)


SCRATCH = Scratch()


def dequantised(codes_XNK: Tensor, scale_XGJ: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantise all experts' weights into scratch memory, which the next call overwrites.

    Returns [X, N, K] in `dtype`, as `reference.dequantised` computes it.
    """
    weight_XNK = SCRATCH.take(codes_XNK.shape, dtype, codes_XNK.device)
    num_experts, num_outputs, num_inputs = codes_XNK.shape
    tiles = triton.cdiv(num_outputs, 32) * triton.cdiv(num_inputs, 128)
    codes_XNK = codes_XNK if reads_fp8(codes_XNK.device) else codes_XNK.view(torch.uint8)
    _dequantise_kernel[(tiles, num_experts)](
        codes_XNK, scale_XGJ, weight_XNK, *codes_XNK.stride(), *scale_XGJ.stride(),
        N=num_outputs, K=num_inputs, BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1], BLOCK_N=32, BLOCK_K=128,
    )  # fmt: skip
    return weight_XNK


def _suits_dense(rows_MK: Tensor, codes_XNK: Tensor, ends_X: Tensor | None) -> bool:
    """Return whether to dequantise the weight in memory: many rows, and a product exists for it."""
    num_experts, num_outputs, num_inputs = codes_XNK.shape
    is_often = triton.cdiv(len(rows_MK), num_experts) >= MANY_ROWS
    if not is_often or codes_XNK.numel() * rows_MK.dtype.itemsize > MAX_SCRATCH_BYTES:
        return False
    if ends_X is None:
        return True
    return _has_grouped_products(rows_MK) and num_outputs % 8 == num_inputs % 8 == 0


def _has_grouped_products(rows_MK: Tensor) -> bool:
    """Return whether PyTorch has grouped products for these rows, without host synchronisation."""
    if not hasattr(torch, "_grouped_mm") or rows_MK.dtype != torch.bfloat16:
        return False
    return rows_MK.device.type == "cuda" and torch.cuda.get_device_capability(rows_MK.device) >= (9, 0)


def _part(num_rows: int, num_tiles: int, num_inputs: int, block_k: int) -> int:
    """Return the number of inputs that a program sums over.

    It is a part of the inputs if few rows would leave a GPU partly idle, else all of them.
    """
    if num_rows > FEW_ROWS:
        return num_inputs
    num_parts = min(PROGRAMS // max(num_tiles, 1), num_inputs // LEAST_PART)
    if num_parts <= 1:
        return num_inputs
    return triton.cdiv(triton.cdiv(num_inputs, num_parts), block_k) * block_k


def reads_fp8(device: torch.device) -> bool:
    """Return whether the device supports e4m3; a device other than CUDA counts as supporting it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _tile(rows_an_expert: int, block_columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile sizes and launch options of a program.

    If possible, the inputs of a tile share a scale.
    """
    is_wide = dtype.itemsize > 2
    block_m = min(64 if is_wide else 128, max(16, triton.next_power_of_2(rows_an_expert)))
    shared = block_columns & -block_columns  # the largest power of two that divides it
    block_k = min(32 if is_wide else 64, shared if shared >= 16 else 64)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": 64 if is_wide else 128, "BLOCK_K": block_k}
    return sizes | {"num_warps": 8 if block_m == 128 else 4, "num_stages": 3}


def fp8_linear(
    rows_MK: Tensor, codes_XNK: Tensor, scale_XGJ: Tensor, block: tuple[int, int], ends_X: Tensor | None = None
) -> Tensor:
    """Triton implementation of `reference.fp8_linear`, without host synchronisation.

    A weight is dequantised in memory only for many rows.
    """
    assert codes_XNK.dtype == torch.float8_e4m3fn and scale_XGJ.dtype == torch.float32
    (num_rows, num_inputs), (num_experts, num_outputs, _) = rows_MK.shape, codes_XNK.shape
    assert ends_X is not None or num_experts == 1, "more than one expert needs ends_X"
    rows_MK = rows_MK if rows_MK.stride(1) == 1 else rows_MK.contiguous()
    if _suits_dense(rows_MK, codes_XNK, ends_X):
        weight_XNK = dequantised(codes_XNK, scale_XGJ, block, rows_MK.dtype)
        if ends_X is None:
            return torch.nn.functional.linear(rows_MK, weight_XNK[0])
        return torch._grouped_mm(rows_MK, weight_XNK.mT, offs=ends_X)
    out_MN = rows_MK.new_empty(num_rows, num_outputs)
    if out_MN.numel() == 0:
        return out_MN
    tile = _tile(triton.cdiv(num_rows, num_experts), block[1], rows_MK.dtype)
    row_tiles = triton.cdiv(num_rows, tile["BLOCK_M"]) if ends_X is None else num_rows // tile["BLOCK_M"] + num_experts
    num_tiles = row_tiles * triton.cdiv(num_outputs, tile["BLOCK_N"])
    part = _part(triton.cdiv(num_rows, num_experts), num_tiles, num_inputs, tile["BLOCK_K"])
    num_parts = triton.cdiv(num_inputs, part)
    sums = out_MN
    if num_parts > 1:
        sums = rows_MK.new_empty(num_parts, num_rows, num_outputs, dtype=torch.float32)
    _product_kernel[(num_tiles, num_parts)](
        rows_MK, codes_XNK if reads_fp8(rows_MK.device) else codes_XNK.view(torch.uint8), scale_XGJ, ends_X, sums,
        rows_MK.stride(0), *codes_XNK.stride(), *scale_XGJ.stride(), num_rows, row_tiles,
        X=num_experts, N=num_outputs, K=num_inputs, BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1],
        BLOCK_X=triton.next_power_of_2(num_experts), TOGETHER=ROWS_TOGETHER, PART=part, **tile,
    )  # fmt: skip
    return out_MN if num_parts == 1 else sums.sum(0).to(rows_MK.dtype)
