"""Triton's interpreter, without work that it repeats thousands of times in a kernel and that changes no result."""

import dataclasses
import importlib
import inspect
import math
from typing import Any

ORIGINALS: dict[str, Any] = {}  # what is replaced, by name
NEEDED = (
    "_patch_builtin",
    "_patch_attr",
    "_patch_lang",
    "_get_np_dtype",
    "ReduceOps",
    "GridExecutor",
    "InterpretedFunction",
    "interpreter_builder",
)


def install() -> None:
    """Replace slow functions of the interpreter, if there is one with these names."""
    try:
        language = importlib.import_module("triton.language")
        interpreter = importlib.import_module("triton.runtime.interpreter")
    except ImportError:  # Triton is optional
        return
    if all(hasattr(interpreter, name) for name in NEEDED):
        ORIGINALS["_patch_builtin"] = interpreter._patch_builtin
        ORIGINALS["generic_reduce"] = interpreter.ReduceOps.generic_reduce
        _remember_builtins(interpreter, language)
        _remember_types(interpreter, language.core)
        _replace_once_a_launch(interpreter)
        interpreter.ReduceOps.generic_reduce = _reduce_whole_slices


def _remember_builtins(interpreter: Any, language: Any) -> None:
    """Search a module for functions to replace once, instead of at every call of a device function.

    Must run before the interpreter has replaced any of them.
    """
    is_builtin = language.core.is_builtin
    core = language.core
    owners = (language, core, core.tensor, language.math, core.tensor_descriptor_base)
    names = {owner: [name for name, member in inspect.getmembers(owner) if is_builtin(member)] for owner in owners}

    def replace_builtins(owner: Any, builder: Any, scope: Any) -> None:
        if owner not in names:
            ORIGINALS["_patch_builtin"](owner, builder, scope)
            return
        for name in names[owner]:
            member = getattr(owner, name)
            if is_builtin(member):
                interpreter._patch_attr(owner, name, member, builder, scope)

    interpreter._patch_builtin = replace_builtins


def _remember_types(interpreter: Any, core: Any) -> None:
    """Describe each type and shape once, instead of for every value; do not compute every integer again in 64 bits."""
    numpy_dtype = interpreter._get_np_dtype
    numpy_dtypes: dict[Any, Any] = {}
    num_elements: dict[tuple[int, ...], int] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    make_block_type = core.block_type.__init__

    def remembered_numpy_dtype(of: Any) -> Any:
        scalar = of.element_ty if isinstance(of, core.block_type) else of
        if isinstance(scalar, core.pointer_type):
            return numpy_dtype(scalar)
        if scalar.name not in numpy_dtypes:
            numpy_dtypes[scalar.name] = numpy_dtype(scalar)
        return numpy_dtypes[scalar.name]

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        if type(shape) is tuple and shape in num_elements:
            self.element_ty = element_ty
            self.shape = shape
            self.numel = num_elements[shape]
            return
        make_block_type(self, element_ty, shape)
        num_elements[self.shape] = self.numel

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])
        self.handle = handle
        self.numel, self.shape = shapes[shape]
        self.type = type
        self.dtype = type.scalar

    interpreter._get_np_dtype = remembered_numpy_dtype
    core.block_type.__init__ = init_block_type
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)
    core.tensor.__init__ = init_tensor
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _replace_once_a_launch(interpreter: Any) -> None:
    """Replace the language for a device function at its first call in a launch alone: nothing restores it before the end."""
    launch = interpreter.GridExecutor.__call__
    done = set()

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> Any:
        done.clear()
        try:
            return launch(self, *arguments, **options)
        finally:
            done.clear()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.fn not in done:
            interpreter._patch_lang(self.fn)
            done.add(self.fn)
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call


def _reduce_whole_slices(self: Any, input: tuple) -> list:
    """Combine all elements that stand at one place of the axis at a time, in the order in which it combines them one by one."""
    import numpy as np

    original_axis = self.axis
    tensors, axis = self.unravel(input, self.axis)
    shape = tensors[0].handle.data.shape

    def slice_at(place: int) -> tuple:
        return tuple(self.to_tensor(np.take(tensor.handle.data, place, axis), tensor.dtype) for tensor in tensors)

    totals = slice_at(0)
    for place in range(1, shape[axis]):
        combined = self.combine_fn.fn(*totals, *slice_at(place))
        totals = combined if isinstance(combined, tuple) else (combined,)
    results = []
    for total, tensor in zip(totals, tensors, strict=True):
        data = total.handle.data.reshape(shape[:axis] + shape[axis + 1 :])
        if self.keep_dims:
            data = data.reshape((1,) * tensor.handle.data.ndim if original_axis is None else np.expand_dims(data, axis).shape)
        results.append(self.to_tensor(data if data.shape else data.item(), tensor.dtype))
    return results
