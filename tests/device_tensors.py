"""Tensors that hold their values on the CPU, and say that they are on `cuda:0`."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)


class MixedDevices(AssertionError):
    """An operation reads tensors of several devices, which CUDA refuses."""


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device. Its values lie in the host's memory, where operations compute."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    # Called with each operation, its arguments and its options, before it computes.
    observe: Callable[[Any, tuple, dict], None] | None = None

    @staticmethod
    def holding(values: torch.Tensor) -> "OnDevice":
        """Wrap a plain tensor; both share their memory."""
        return torch.Tensor._make_subclass(OnDevice, values)

    def __new__(cls, values: torch.Tensor) -> "OnDevice":
        return cls.holding(values)

    def __repr__(self) -> str:
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = OnDevice.holding(values_of(self).clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def numpy(self) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host first.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if OnDevice.observe is not None:
            OnDevice.observe(func, args, kwargs)
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            result = _on_a_cpu(func)(*args, **kwargs)
        return tree_map_only(torch.Tensor, _on_device_unless_written_to(args, kwargs), result)


def _on_a_cpu(func: Any) -> Callable[..., Any]:
    """Return the operation, or what computes it where PyTorch has it for CUDA alone."""
    if func is torch.ops.aten.histc.default:
        return lambda x, *args, **kwargs: func(x.float(), *args, **kwargs).to(x.dtype)
    return func


def _on_device_unless_written_to(args: tuple, kwargs: dict) -> Callable[[torch.Tensor], torch.Tensor]:
    """Results are on the device; an argument that is returned, as in-place operations return theirs, stays what it is."""
    arguments = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}

    def moved(result: torch.Tensor) -> torch.Tensor:
        return result if id(result) in arguments or isinstance(result, OnDevice) else OnDevice.holding(result)

    return moved


def values_of(x: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor that shares the memory of `x`."""
    if not isinstance(x, OnDevice):
        return x
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return x.detach()
