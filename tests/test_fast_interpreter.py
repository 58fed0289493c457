"""The interpreter that the tests run kernels in computes what Triton's own does."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402 (behind importorskip)

from tests import fast_interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")


@triton.jit
def _difference(a, b):
    return a - b


@triton.jit
def _later_of_larger(value, place, other_value, other_place):
    is_other = other_value >= value
    return tl.where(is_other, other_value, value), tl.where(is_other, other_place, place)


@triton.jit
def _kernel(numbers, differences, places, flat, AXIS: tl.constexpr, KEEP: tl.constexpr, OUT: tl.constexpr):
    place_AB = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    number_AB = tl.load(numbers + place_AB)
    difference = tl.reduce(number_AB, AXIS, _difference, keep_dims=KEEP)
    _, place = tl.reduce((number_AB, place_AB), AXIS, _later_of_larger, keep_dims=KEEP)
    tl.store(differences + tl.arange(0, OUT), tl.reshape(difference, [OUT]))
    tl.store(places + tl.arange(0, OUT), tl.reshape(place, [OUT]))
    tl.store(flat, tl.reduce(number_AB, None, _difference))


def reduced(axis: int, keep: bool) -> list[torch.Tensor]:
    size = 8 if axis == 0 else 4
    numbers_AB = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    numbers_AB[1, 3] = torch.nan
    results = torch.zeros(size), torch.zeros(size, dtype=torch.int32), torch.zeros(1)
    _kernel[(1,)](numbers_AB, *results, AXIS=axis, KEEP=keep, OUT=size)
    return list(results)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_whole_slices_are_combined_as_single_elements_are(axis, keep, monkeypatch):
    from triton.runtime import interpreter

    assert interpreter.ReduceOps.generic_reduce is fast_interpreter._reduce_whole_slices
    ours = reduced(axis, keep)
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", fast_interpreter.ORIGINALS["generic_reduce"])
    for mine, theirs in zip(ours, reduced(axis, keep), strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


def test_the_same_functions_are_replaced():
    from triton.runtime import interpreter

    owners = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    for owner in owners:
        changes = []
        for replace in (interpreter._patch_builtin, fast_interpreter.ORIGINALS["_patch_builtin"]):
            scope = interpreter._LangPatchScope()
            replace(owner, interpreter.interpreter_builder, scope)
            changes.append([(name, original) for _, name, original in scope._changes])
            scope.restore()
        assert changes[0] == changes[1]
