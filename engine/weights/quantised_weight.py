"""A tensor subclass for weights that stay quantised in memory and are dequantised in products.

Operations that only move values (slices, stacks, transposes, copies to a device) return a quantised
weight. Its blocks are smaller if a slice does not end at a block's end. All other operations get a
temporary dequantised weight.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from engine.kernels import choose_fp8_activations, choose_fp8_linear, reference

aten = torch.ops.aten
# Handlers by operation. A handler returns None if the weight has to be dequantised.
_KEEPERS: dict[Any, Callable[..., "QuantisedWeight | None"]] = {}


class QuantisedWeight(Tensor):
    """A quantised tensor: each value is that of a code times the scale of its block, in `dtype`.

    codes: fp8, or uint8 with two 4-bit codes per byte along one dimension, the first in the lower
    half.
    scale: one scale per block.
    block: number of values along each dimension that share a scale. The last block may be shorter.
    meanings: values of the 16 codes of 4 bits; None if codes are fp8 numbers.
    packing: number of codes per byte along each dimension: 2 for the packed dimension, otherwise 1.
    row_group: None, or the number of inputs that share a scale if rows are also quantised before
    they are multiplied by this weight. Groups are counted from the first input of this part of the
    weight.
    """

    codes: Tensor
    scale: Tensor
    block: tuple[int, ...]
    meanings: tuple[float, ...] | None
    packing: tuple[int, ...]
    row_group: int | None

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scale: Tensor,
        block: Sequence[int],
        dtype: torch.dtype = torch.float32,
        meanings: tuple[float, ...] | None = None,
        packing: Sequence[int] | None = None,
        row_group: int | None = None,
    ) -> "QuantisedWeight":
        packing = tuple(packing or [1] * codes.ndim)
        shape = [size * values for size, values in zip(codes.shape, packing, strict=True)]
        # In inference mode, a view of a normal tensor must be a normal tensor too.
        with torch.inference_mode(False):
            weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        weight.codes = codes
        weight.scale = scale
        weight.block = tuple(block)
        weight.meanings = meanings
        weight.packing = packing
        weight.row_group = row_group
        return weight

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # torch's stubs declare it writable, which it is not
        """Bytes of codes and scales in memory."""
        return self.codes.nbytes + self.scale.nbytes

    def dequantised(self) -> Tensor:
        """Return the values as a plain tensor of `dtype`."""
        codes = self.codes
        if self.meanings is not None:
            dim = self.packing.index(2)
            pairs = torch.stack((codes & 15, codes >> 4), dim + 1).flatten(dim, dim + 1)
            codes = _meanings(self.meanings, codes.device)[pairs.int()]
        elif codes.device.type == "cpu":  # PyTorch's conversion of fp8 takes six times as long
            codes = (
                _meanings(codes.dtype, codes.device).index_select(0, codes.view(torch.uint8).int().flatten()).view(codes.shape)
            )
        return reference.dequantised(codes, self.scale, self.block, self.dtype)

    def _like(self, codes: Tensor, scale: Tensor, **changes: Any) -> "QuantisedWeight":
        same = {name: getattr(self, name) for name in ("block", "dtype", "meanings", "packing", "row_group")}
        return QuantisedWeight(codes, scale, **(same | changes))

    def _scale_of(self, block: Sequence[int]) -> Tensor:
        """Return the scales of smaller blocks, whose sizes divide those of this weight's blocks."""
        scale = self.scale
        for dim, (own, smaller) in enumerate(zip(self.block, block, strict=True)):
            if own != smaller:
                scale = scale.repeat_interleave(own // smaller, dim).narrow(dim, 0, -(-self.shape[dim] // smaller))
        return scale

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _PRODUCTS.get(func, func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a plain function in place of the class method
        cls, func: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KEEPERS and (kept := _KEEPERS[func](*args, **kwargs)) is not None:
            return kept
        assert not (func._schema.is_mutable and isinstance(args[0], cls)), f"{func} would write to a quantised weight"
        args, kwargs = tree_map_only(cls, cls.dequantised, (args, kwargs))
        return func(*args, **kwargs)


def plain_tensor(weight: Tensor) -> Tensor:
    """Dequantise a weight, or return it unchanged if it is not quantised."""
    return weight.dequantised() if isinstance(weight, QuantisedWeight) else weight


@cache
def _meanings(codes: torch.dtype | tuple[float, ...], device: torch.device) -> Tensor:
    """Return the fp32 value of each code."""
    if isinstance(codes, torch.dtype):
        return torch.arange(256, dtype=torch.uint8, device=device).view(codes).float()
    return torch.tensor(codes, device=device)


def _keeps(*operations: Any) -> Callable:
    def register(keeper: Callable) -> Callable:
        _KEEPERS.update(dict.fromkeys(operations, keeper))
        return keeper

    return register


@_keeps(aten.detach.default, aten.alias.default)
def _same(weight: QuantisedWeight) -> QuantisedWeight:
    return weight._like(weight.codes, weight.scale)


@_keeps(aten._to_copy.default)
def _to_copy(weight: QuantisedWeight, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> QuantisedWeight:
    return weight._like(weight.codes.to(device=device), weight.scale.to(device=device), dtype=dtype or weight.dtype)


@_keeps(aten.new_empty.default)
def _new_empty(weight: QuantisedWeight, shape: Sequence[int], **options: Any) -> QuantisedWeight | None:
    """Return an uninitialised weight with another size of dimension 0."""
    if list(shape[1:]) != list(weight.shape[1:]) or weight.block[0] * weight.packing[0] != 1 or any(options.values()):
        return None
    return weight._like(*(part.new_empty(shape[0], *part.shape[1:]) for part in (weight.codes, weight.scale)))


@_keeps(aten.copy_.default)
def _copy(to: Tensor, weight: Tensor, *_: Any) -> QuantisedWeight | None:
    if not isinstance(to, QuantisedWeight) or not isinstance(weight, QuantisedWeight) or to.block != weight.block:
        return None
    same = ("shape", "packing", "meanings", "row_group")
    assert all(getattr(to, name) == getattr(weight, name) for name in same)
    to.codes.copy_(weight.codes)
    to.scale.copy_(weight.scale)
    return to


@_keeps(aten.transpose.int)
def _transpose(weight: QuantisedWeight, dim: int, other: int) -> QuantisedWeight:
    def swapped(values: Sequence[int]) -> list[int]:
        values = list(values)
        values[dim], values[other] = values[other], values[dim]
        return values

    parts = (part.transpose(dim, other) for part in (weight.codes, weight.scale))
    return weight._like(*parts, block=swapped(weight.block), packing=swapped(weight.packing))


@_keeps(aten.select.int)
def _select(weight: QuantisedWeight, dim: int, index: int) -> QuantisedWeight | None:
    if weight.ndim < 3 or dim != 0 or weight.block[0] * weight.packing[0] != 1:
        return None
    return weight._like(weight.codes[index], weight.scale[index], block=weight.block[1:], packing=weight.packing[1:])


@_keeps(aten.unsqueeze.default)
def _unsqueeze(weight: QuantisedWeight, dim: int) -> QuantisedWeight | None:
    if dim != 0:
        return None
    return weight._like(weight.codes[None], weight.scale[None], block=(1, *weight.block), packing=(1, *weight.packing))


@_keeps(aten.slice.Tensor)
def _slice(
    weight: QuantisedWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> QuantisedWeight | None:
    dim %= weight.ndim
    start, end, _ = slice(start, end).indices(weight.shape[dim])
    per_code = weight.packing[dim]
    block = list(weight.block)
    if step != 1 or start % per_code or end % per_code:
        return None
    group = weight.row_group
    if group is not None and dim == weight.ndim - 1 and (start % group or (end % group and end != weight.shape[dim])):
        problem = f"a rank's part, inputs {start} to {end} of {weight.shape[dim]}, is not aligned to groups of {group}"
        raise ValueError(f"target.fp8_activations=true: {problem}; set it to false, or parallel.tp_size lower")
    block[dim] = gcd(block[dim], start)
    first = start // block[dim]
    count = -(-(end - start) // block[dim])
    codes = weight.codes.narrow(dim, start // per_code, (end - start) // per_code)
    return weight._like(codes, weight._scale_of(block).narrow(dim, first, count), block=block)


@_keeps(aten.cat.default)
def _cat(weights: Sequence[Tensor], dim: int = 0) -> QuantisedWeight | None:
    quantised = [weight for weight in weights if isinstance(weight, QuantisedWeight)]
    kinds = {(weight.meanings, weight.packing, weight.dtype, weight.row_group) for weight in quantised}
    if len(quantised) < len(weights) or len(kinds) > 1:
        return None
    block = [gcd(*sizes) for sizes in zip(*(weight.block for weight in quantised), strict=True)]
    block[dim] = gcd(block[dim], *(weight.shape[dim] for weight in quantised[:-1]))
    codes = torch.cat([weight.codes for weight in quantised], dim)
    scale = torch.cat([weight._scale_of(block) for weight in quantised], dim)
    return quantised[0]._like(codes, scale, block=block)


@_keeps(aten.stack.default)
def _stack(weights: Sequence[Tensor], dim: int = 0) -> QuantisedWeight | None:
    if dim != 0 or not all(isinstance(weight, QuantisedWeight) for weight in weights):
        return None
    return _cat([_unsqueeze(weight, 0) for weight in weights])


def _product(weight: QuantisedWeight) -> Callable[..., Tensor] | None:
    """Return the device's kernel for products with an fp8 weight, or None if there is none."""
    if weight.codes.dtype != torch.float8_e4m3fn:
        return None
    if weight.row_group is None:
        return choose_fp8_linear(weight.codes.device)
    product = choose_fp8_activations(weight.codes.device)
    return product and partial(product, group=weight.row_group)


def _as_multiplied(rows_MK: Tensor, weight: Tensor) -> Tensor:
    """Return the rows to multiply by a dequantised weight, rounded to fp8 if `row_group` is set."""
    group = weight.row_group if isinstance(weight, QuantisedWeight) else None
    return rows_MK if group is None else reference.rounded_rows(rows_MK, group)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows_MK = rows.reshape(-1, rows.shape[-1])
    if isinstance(weight, QuantisedWeight) and (product := _product(weight)) is not None:
        out_MN = product(rows_MK, weight.codes[None], weight.scale[None], weight.block)
        out = out_MN.view(*rows.shape[:-1], -1)
        return out if bias is None else out + bias
    return F.linear(_as_multiplied(rows_MK, weight).view(rows.shape), weight, bias)


def _grouped_mm(rows_MK: Tensor, weight_XKN: QuantisedWeight, *, offs: Tensor, **others: None) -> Tensor:
    """Compute `torch._grouped_mm` with the arguments that Transformers passes.

    rows_MK: sorted by expert.
    offs: end of each expert's rows.
    """
    assert not any(others.values()), "Transformers asks for no bias and no other dtype"
    weight_XNK = _transpose(weight_XKN, 1, 2)
    if product := _product(weight_XNK):
        return product(rows_MK, weight_XNK.codes, weight_XNK.scale, weight_XNK.block[1:], offs)
    rows_MK = _as_multiplied(rows_MK, weight_XNK)
    return reference.grouped_linear(rows_MK, lambda expert: plain_tensor(weight_XNK[expert]), weight_XNK.shape[1], offs)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch._grouped_mm: _grouped_mm,  # F.grouped_mm calls it
}
