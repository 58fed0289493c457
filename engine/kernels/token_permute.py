"""Triton kernels that sort rows of tokens by expert and sum them by token, in one launch each.

T tokens, N rows that are copied, M rows that are summed, at most J rows per token, D hidden size:

    permute:    out[n]   = rows[source[n]]                        times its scale if rows hold codes
    quantise:   scale[n] = max(1e-10, largest magnitude of rows[source[n]]) / 448
                codes[n] = e4m3(rows[source[n]] / scale[n])
    un-permute: out[t]   = sum_j weight[t, j] rows[place[t, j]]   over the places of at least 0, in fp32

The sum of a token runs over j in ascending order within one program, so there are no atomic
additions and the result does not depend on the order of the programs. A place of -1 is not read, so
a NaN in another row does not spread.

Codes are read and written as the bits of e4m3 (see fp8_linear.py for the decoding; the encoding is
its inverse). The kernels therefore run on every GPU that Triton supports, with or without fp8
instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.fp8_activations import FLOOR, LARGEST, larger, rounded
from engine.kernels.fp8_linear import decode

MAX_BLOCK_D = 2048
VALUES_PER_WARP = 512  # sixteen per thread

_INVERSE_BIAS = tl.constexpr(2.0**-120)  # difference between the exponent biases of e4m3 and fp32


@triton.jit
def _encode(values):
    """Convert fp32 values of magnitude at most 448 to e4m3 codes, uint8; halves round to even."""
    bits = (rounded(values) * _INVERSE_BIAS).to(tl.int32, bitcast=True)
    magnitude = (bits >> 20) & 127
    sign = tl.where(values < 0, 128, 0)
    return (magnitude | sign).to(tl.uint8)


@triton.jit
def _permute_kernel(
    rows_TD, scale_T, source_N, out_ND, rows_stride, scale_stride, out_stride, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    d_B = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    source = tl.load(source_N + n).to(tl.int64)
    values_B = tl.load(rows_TD + source * rows_stride + d_B, mask=d_B < D, other=0)
    if scale_T is not None:
        values_B = decode(values_B) * tl.load(scale_T + source * scale_stride)
    tl.store(out_ND + n * out_stride + d_B, values_B.to(out_ND.dtype.element_ty), mask=d_B < D)


@triton.jit
def _quantise_kernel(
    rows_TD, source_N, codes_ND, scale_N, rows_stride, codes_stride, scale_stride, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    source = n
    if source_N is not None:
        source = tl.load(source_N + n).to(tl.int64)
    d_B = tl.arange(0, BLOCK_D)
    values_B = tl.load(rows_TD + source * rows_stride + d_B, mask=d_B < D, other=0.0).to(tl.float32)
    largest = larger(tl.reduce(tl.abs(values_B), 0, larger), FLOOR)
    scale = tl.div_rn(largest, tl.full([], LARGEST, tl.float32))
    codes_B = _encode(tl.div_rn(values_B, tl.broadcast_to(scale, [BLOCK_D])))
    tl.store(codes_ND + n * codes_stride + d_B, codes_B, mask=d_B < D)
    tl.store(scale_N + n * scale_stride, scale)


@triton.jit
def _unpermute_kernel(
    rows_MD, place_TJ, weight_TJ, out_TD,
    rows_stride, place_stride_t, place_stride_j, weight_stride_t, weight_stride_j, out_stride,
    J: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d_B = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_B = tl.zeros([BLOCK_D], tl.float32)
    for j in range(J):
        place = tl.load(place_TJ + t * place_stride_t + j * place_stride_j).to(tl.int64)
        if place >= 0:
            values_B = tl.load(rows_MD + place * rows_stride + d_B, mask=d_B < D, other=0)
            if IS_FP8:
                values_B = decode(values_B)
            values_B = values_B.to(tl.float32)
            if weight_TJ is not None:
                values_B *= tl.load(weight_TJ + t * weight_stride_t + j * weight_stride_j).to(tl.float32)
            sum_B += values_B
    tl.store(out_TD + t * out_stride + d_B, sum_B.to(out_TD.dtype.element_ty), mask=d_B < D)


def _block(width: int, most: int) -> dict[str, int]:
    """Return the number of values of a row per program, at most `most`, and the number of warps."""
    block = min(most, triton.next_power_of_2(width))
    num_warps = min(8, max(1, block // VALUES_PER_WARP))
    return {"BLOCK_D": block, "num_warps": num_warps}


def _bits(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows


def permute_rows(rows_TD: Tensor, source_N: Tensor, out_ND: Tensor, scale_T: Tensor | None = None) -> Tensor:
    """Triton implementation of `reference.permute_rows`."""
    assert rows_TD.stride(1) == out_ND.stride(1) == 1, "the values of a row must be contiguous"
    assert source_N.is_contiguous(), "source_N must be contiguous"
    assert (scale_T is not None) == (rows_TD.dtype == torch.float8_e4m3fn), "codes need scales"
    count, width = out_ND.shape
    if out_ND.numel() == 0:
        return out_ND
    block = _block(width, MAX_BLOCK_D)
    scale_stride = 0 if scale_T is None else scale_T.stride(0)
    _permute_kernel[(count, triton.cdiv(width, block["BLOCK_D"]))](
        _bits(rows_TD), scale_T, source_N, out_ND, rows_TD.stride(0), scale_stride, out_ND.stride(0), D=width, **block
    )
    return out_ND


def quantise_rows(rows_TD: Tensor, source_N: Tensor | None, codes_ND: Tensor, scale_N: Tensor) -> None:
    """Triton implementation of `reference.quantise_rows`."""
    assert rows_TD.stride(1) == codes_ND.stride(1) == 1, "the values of a row must be contiguous"
    assert source_N is None or source_N.is_contiguous(), "source_N must be contiguous"
    count, width = codes_ND.shape
    if codes_ND.numel() == 0:
        return
    block = _block(width, triton.next_power_of_2(width))  # whole rows, for the scale
    _quantise_kernel[(count,)](
        rows_TD, source_N, _bits(codes_ND), scale_N,
        rows_TD.stride(0), codes_ND.stride(0), scale_N.stride(0), D=width, **block,
    )  # fmt: skip


def unpermute_rows(rows_MD: Tensor, place_TJ: Tensor, out_TD: Tensor, weight_TJ: Tensor | None = None) -> Tensor:
    """Triton implementation of `reference.unpermute_rows`."""
    assert rows_MD.stride(1) == out_TD.stride(1) == 1, "the values of a row must be contiguous"
    count, width = out_TD.shape
    if out_TD.numel() == 0:
        return out_TD
    block = _block(width, MAX_BLOCK_D)
    weight_strides = (0, 0) if weight_TJ is None else weight_TJ.stride()
    _unpermute_kernel[(count, triton.cdiv(width, block["BLOCK_D"]))](
        _bits(rows_MD), place_TJ, weight_TJ, out_TD,
        rows_MD.stride(0), *place_TJ.stride(), *weight_strides, out_TD.stride(0),
        J=place_TJ.shape[1], D=width, IS_FP8=rows_MD.dtype == torch.float8_e4m3fn, **block,
    )  # fmt: skip
    return out_TD
