"""Rows times the transposes of experts' fp8 weights, with both operands in e4m3.

Rows are quantised to fp8 on the fly. M rows sorted by expert, X experts, K inputs, N outputs. A
weight has a scale for every block of b rows and c columns; a row has one for every g inputs. Let e
be the expert of row m. The inputs are divided into steps I such that all inputs of a step share
their scales. Then

    row_scale[m, k // g] = max(1e-10, largest magnitude of row m in that group) / 448
    row_codes[m, k]      = e4m3(rows[m, k] / row_scale[m, k // g])
    out[m, n]            = round(sum_I row_scale[m, I] scale[e, n // b, I] sum_{k in I} row_codes[m, k] codes[e, n, k])

which is what servers of such checkpoints compute. Apart from rounding, no quotient exceeds 448, the
largest number of e4m3. Quotients are rounded to numbers that e4m3 represents before they are
converted, because Triton's interpreter converts other numbers wrongly. If a row contains a NaN, its
scale is NaN.

Tensor cores multiply fp8 by fp8 at twice the rate of bf16. On Hopper they accumulate such products
with 13 bits of fraction, so the sum of each step is scaled and added to the others in fp32. A step
has 128 inputs, or the largest power of two of inputs that share their scales: 64 where a weight's
blocks are split in half between ranks. If that is less than 32, or if the GPU cannot multiply fp8
(before compute capability 8.9), rows are dequantised again and multiplied as in fp8_linear.py.

A program computes a tile of rows times outputs. Rows run along the first dimension of the tensor
cores' product, where a thread holds two of them. Per step it reads two row scales, and one weight
scale if all outputs of the tile lie in one block.

For many rows of one weight in whole blocks on Hopper, the product of cuBLASLt is used through
PyTorch. It scales the sums of one tile while it accumulates another tile, which Triton does not.
"""

from math import gcd

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import reference
from engine.kernels.fp8_linear import ROWS_TOGETHER, fp8_linear, reads_fp8, tile_of

FLOOR = tl.constexpr(reference.FLOOR)
LARGEST = tl.constexpr(reference.LARGEST)
_EXPONENT = tl.constexpr(255 << 23)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
_SHIFT = tl.constexpr(1.5 * 2.0**20)  # times 2**e, an fp32 number with a last bit of 2**(e - 3)
SMALLEST_STEP = 32  # inputs per tensor core instruction
CUBLAS_GROUP, CUBLAS_INPUTS, CUBLAS_ROWS = 128, 512, 4  # scales are padded to 4 blocks of inputs and 4 rows
MANY_ROWS = 1024  # from this number of rows, cuBLASLt's tiles fill a GPU


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rounded(values):
    """Round fp32 values to numbers that e4m3 represents, halves to even.

    Normal numbers keep three bits of fraction; subnormal ones become multiples of 2**-9.
    """
    power = (values.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
    shifted = tl.maximum(power, _SMALLEST_NORMAL) * _SHIFT
    return (values + shifted) - shifted


@triton.jit(do_not_specialize=["num_rows", "padded_rows"])
def _quantise_kernel(
    rows_MK, codes_MK, scale_JM, rows_stride, num_rows, padded_rows,
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(K, GROUP)
    group = tl.program_id(0) % groups
    m_M = tl.program_id(0) // groups * BLOCK_M + tl.arange(0, BLOCK_M)
    k_G = group * GROUP + tl.arange(0, BLOCK_G)
    there_G = (k_G < (group + 1) * GROUP) & (k_G < K)
    there_MG = (m_M < num_rows)[:, None] & there_G[None, :]
    from_MG = rows_MK + m_M.to(tl.int64)[:, None] * rows_stride + k_G[None, :]
    rows_MG = tl.load(from_MG, mask=there_MG, other=0.0).to(tl.float32)
    largest_M = larger(tl.reduce(tl.abs(rows_MG), 1, larger), FLOOR)
    scale_M = tl.div_rn(largest_M, tl.full([BLOCK_M], LARGEST, tl.float32))
    codes_MG = rounded(tl.div_rn(rows_MG, tl.broadcast_to(scale_M[:, None], [BLOCK_M, BLOCK_G])))
    to_MG = codes_MK + m_M.to(tl.int64)[:, None] * K + k_G[None, :]
    tl.store(to_MG, codes_MG.to(codes_MK.dtype.element_ty), mask=there_MG)
    tl.store(scale_JM + group.to(tl.int64) * padded_rows + m_M, scale_M, mask=m_M < num_rows)


@triton.jit(do_not_specialize=["num_rows", "row_tiles"])
def _product_kernel(
    rows_MK, row_scale_JM, codes_XNK, scale_XGJ, ends_X, out_MN,
    codes_stride_x, codes_stride_n, codes_stride_k, scale_stride_x, scale_stride_g, scale_stride_j,
    num_rows, row_tiles, X: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    expert, first_row, end, first_output = tile_of(ends_X, num_rows, row_tiles, X, N, BLOCK_X, BLOCK_M, BLOCK_N, TOGETHER)
    if expert >= X:
        return
    m_M = first_row + tl.arange(0, BLOCK_M)
    n_N = first_output + tl.arange(0, BLOCK_N)
    # Past the ends, the last row or output is read again: a mask would cost registers.
    near_M = tl.minimum(m_M, num_rows - 1)
    near_N = tl.minimum(n_N, N - 1)
    rows_M1 = rows_MK + near_M.to(tl.int64)[:, None] * K
    codes_1N = codes_XNK + expert * codes_stride_x + near_N.to(tl.int64)[None, :] * codes_stride_n
    scale_of_block = scale_XGJ + expert * scale_stride_x
    if BLOCK_ROWS % BLOCK_N == 0:
        scale_of_block += first_output // BLOCK_ROWS * scale_stride_g
    else:
        scale_of_block += near_N // BLOCK_ROWS * scale_stride_g
    row_scale_M = tl.load(row_scale_JM + near_M)
    scale = tl.load(scale_of_block)
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        from_MK = rows_M1 + k_K[None, :]
        from_KN = codes_1N + k_K[:, None] * codes_stride_k
        if K % BLOCK_K == 0:
            rows_tile_MK = tl.load(from_MK)
            codes_KN = tl.load(from_KN)
        else:
            rows_tile_MK = tl.load(from_MK, mask=k_K[None, :] < K, other=0.0)
            codes_KN = tl.load(from_KN, mask=k_K[:, None] < K, other=0.0)
        # Load the scales of the next step while the tensor cores compute this one.
        ahead = tl.minimum(start + BLOCK_K, K - 1)
        next_row_scale_M = tl.load(row_scale_JM + (ahead // GROUP).to(tl.int64) * num_rows + near_M)
        next_scale = tl.load(scale_of_block + ahead // BLOCK_COLUMNS * scale_stride_j)
        part_MN = tl.dot(rows_tile_MK, codes_KN)
        if BLOCK_ROWS % BLOCK_N == 0:
            sum_MN += part_MN * (row_scale_M * scale)[:, None]
        else:
            sum_MN += part_MN * row_scale_M[:, None] * scale[None, :]
        row_scale_M = next_row_scale_M
        scale = next_scale
    out = out_MN + m_M.to(tl.int64)[:, None] * N + n_N[None, :]
    tl.store(out, sum_MN.to(out_MN.dtype.element_ty), mask=(m_M[:, None] < end) & (n_N[None, :] < N))


def quantise_rows(rows_MK: Tensor, group: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Quantise rows as `reference.quantised_rows` does, but return the scales transposed.

    multiple: the number of rows M is padded to a multiple of it; the padding has arbitrary content.
    Returns codes, e4m3 [M, K], and scales, fp32 [ceil(K / group), M].
    """
    (num_rows, num_inputs), num_groups = rows_MK.shape, triton.cdiv(rows_MK.shape[1], group)
    rows_MK = rows_MK if rows_MK.stride(1) == 1 else rows_MK.contiguous()
    padded_rows = -(-num_rows // multiple) * multiple
    block_m = 32
    codes_MK = rows_MK.new_empty(padded_rows, num_inputs, dtype=torch.float8_e4m3fn)
    scale_JM = rows_MK.new_empty(num_groups, padded_rows, dtype=torch.float32)
    _quantise_kernel[(triton.cdiv(num_rows, block_m) * num_groups,)](
        rows_MK, codes_MK, scale_JM, rows_MK.stride(0), num_rows, padded_rows,
        K=num_inputs, GROUP=group, BLOCK_G=triton.next_power_of_2(group), BLOCK_M=block_m,
    )  # fmt: skip
    return codes_MK, scale_JM


def _step(group: int, block_columns: int) -> int:
    """Return the inputs per step: a power of two of at most 128 that share their scales."""
    together = gcd(group, block_columns)
    return min(128, together & -together)


def _tile(rows_an_expert: int, block_rows: int, step: int) -> dict[str, int]:
    """Return the tile sizes and launch options of a program.

    A thread holds two accumulators, of the current step and of all steps; larger tiles would spill.
    """
    block_m = 128 if rows_an_expert >= 128 else 64
    sizes = {"BLOCK_M": block_m, "BLOCK_N": 128 if block_rows % 128 == 0 else 64, "BLOCK_K": step}
    return sizes | {"num_warps": block_m // 16, "num_stages": 3}


def _has_cublas_blocks(device: torch.device) -> bool:
    """Return whether cuBLASLt supports block scales on the device and PyTorch exposes that."""
    if device.type != "cuda" or not hasattr(F, "scaled_mm") or torch.version.cuda is None:
        return False
    version = tuple(int(part) for part in torch.version.cuda.split("."))
    return version >= (12, 9) and torch.cuda.get_device_capability(device) == (9, 0)


def _suits_cublas(rows_MK: Tensor, codes_XNK: Tensor, scale_XGJ: Tensor, block: tuple[int, int], group: int) -> bool:
    (num_experts, num_outputs, num_inputs), num_rows = codes_XNK.shape, len(rows_MK)
    whole = (group, *block) == (CUBLAS_GROUP,) * 3 and num_inputs % CUBLAS_INPUTS == num_outputs % CUBLAS_GROUP == 0
    is_one = num_experts == 1 and codes_XNK.is_contiguous() and scale_XGJ.is_contiguous()
    suits = whole and is_one and num_rows >= MANY_ROWS and rows_MK.dtype == torch.bfloat16
    return suits and _has_cublas_blocks(rows_MK.device)


def _cublas_product(codes_MK: Tensor, row_scale_JM: Tensor, codes_NK: Tensor, scale_GJ: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the block-scaled product by cuBLASLt, [M, N]. M must be a multiple of 4."""
    return F.scaled_mm(
        codes_MK,
        codes_NK.t(),
        row_scale_JM.t(),
        F.ScalingType.BlockWise1x128,
        scale_GJ.t(),
        F.ScalingType.BlockWise128x128,
        swizzle_a=F.SwizzleType.NO_SWIZZLE,
        swizzle_b=F.SwizzleType.NO_SWIZZLE,
        output_dtype=dtype,
    )


def fp8_activations(
    rows_MK: Tensor,
    codes_XNK: Tensor,
    scale_XGJ: Tensor,
    block: tuple[int, int],
    ends_X: Tensor | None = None,
    *,
    group: int,
) -> Tensor:
    """Triton implementation of `reference.fp8_activations`, without host synchronisation.

    Products in fp8 dequantise no weight in memory.
    """
    assert codes_XNK.dtype == torch.float8_e4m3fn and scale_XGJ.dtype == torch.float32
    (num_rows, num_inputs), (num_experts, num_outputs, _) = rows_MK.shape, codes_XNK.shape
    assert ends_X is not None or num_experts == 1, "more than one expert needs ends_X"
    step = _step(group, block[1])
    if step < SMALLEST_STEP or not reads_fp8(rows_MK.device):
        return fp8_linear(reference.rounded_rows(rows_MK, group), codes_XNK, scale_XGJ, block, ends_X)
    if ends_X is None and _suits_cublas(rows_MK, codes_XNK, scale_XGJ, block, group):
        codes_MK, row_scale_JM = quantise_rows(rows_MK, group, CUBLAS_ROWS)
        return _cublas_product(codes_MK, row_scale_JM, codes_XNK[0], scale_XGJ[0], rows_MK.dtype)[:num_rows]
    out_MN = rows_MK.new_empty(num_rows, num_outputs)
    if out_MN.numel() == 0:
        return out_MN
    codes_MK, row_scale_JM = quantise_rows(rows_MK, group)
    tile = _tile(triton.cdiv(num_rows, num_experts), block[0], step)
    row_tiles = triton.cdiv(num_rows, tile["BLOCK_M"]) if ends_X is None else num_rows // tile["BLOCK_M"] + num_experts
    _product_kernel[(row_tiles * triton.cdiv(num_outputs, tile["BLOCK_N"]),)](
        codes_MK, row_scale_JM, codes_XNK, scale_XGJ, ends_X, out_MN,
        *codes_XNK.stride(), *scale_XGJ.stride(), num_rows, row_tiles,
        X=num_experts, N=num_outputs, K=num_inputs, GROUP=group, BLOCK_ROWS=block[0], BLOCK_COLUMNS=block[1],
        BLOCK_X=triton.next_power_of_2(num_experts), TOGETHER=ROWS_TOGETHER, **tile,
    )  # fmt: skip
    return out_MN
