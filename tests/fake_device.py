"""A fake CUDA device, on which code for a GPU runs in a test without one.

Within `FakeDevice()` every value is computed as on a CPU, so results can be compared. What is
checked is where tensors are:

- an operation whose tensors are on different devices raises `MixedDevices`, except where CUDA
  allows it (scalars and indices on the host, copies between devices);
- whatever makes the host wait for the device is recorded with the line that caused it (`Wait`);
- launches of device operations are counted. Operations that only describe memory, such as views,
  launch nothing. An operation of PyTorch counts once, although some launch several kernels, and
  so does each Triton kernel.

Threads that start within it are on the device too. Not seen: streams, and what libraries do below
PyTorch's dispatcher (NCCL, cuBLAS, DeepSpeed's extensions).
"""

import collections
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import (
    BuiltinFunctionType,
    FrameType,
    MethodDescriptorType,
    SimpleNamespace,
    WrapperDescriptorType,
)
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.device_tensors import DEVICE, MixedDevices, OnDevice, values_of
from tests.fake_driver import driver_patches

ROOT = Path(__file__).resolve().parents[1]
_OWN_FILES = tuple(str(ROOT / "tests" / name) for name in ("fake_device.py", "fake_driver.py", "device_tensors.py"))
PACKAGES = Path(torch.__file__).resolve().parents[1]

# Operations that read a number back, or whose result has a size that only the device knows.
_READS_BACK = {
    "_local_scalar_dense": "item",
    "equal": "equal",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "unique_consecutive": "unique",
    "unique_dim": "unique",
    "_unique": "unique",
    "_unique2": "unique",
    "bincount": "bincount",
    "linalg_eigh": "linalg",
    "_linalg_eigh": "linalg",
    "_linalg_svd": "linalg",
}
_MAY_MIX = {
    "copy_",
    "_copy_from",
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
}
_LAUNCHES_NOTHING = {
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_local_scalar_dense",
    "sym_size",
    "is_same_size",
    "set_",
    "resize_",
}
_FACTORIES_WITHOUT_LAUNCH = {"empty", "empty_strided"}
_FACTORIES_FROM_HOST = {"tensor", "as_tensor", "asarray", "from_numpy", "frombuffer"}


@dataclass(frozen=True)
class Wait:
    """Something that made the host wait for the device.

    kind: `item`, `nonzero`, `boolean index`, `copy to the host`, `pageable copy to the device`, ...
    place: file and line of the innermost frame of the project, else of a test, else of a package.
    function: the name of that frame's function. package: the file of a package that waited on the
    project's behalf, or "".
    stage: what `FakeDevice.stage` said then.
    """

    kind: str
    place: str
    function: str
    package: str
    stage: str = ""

    @property
    def file(self) -> str:
        return self.place.rsplit(":", 1)[0]


class _MadeWithin(TorchDispatchMode):
    """Puts on the device what an operation on the device makes for itself, such as a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.is_within = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.is_within or any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
            return result
        return tree_map_only(torch.Tensor, OnDevice.holding, result)

    @contextmanager
    def operation(self, is_on_device: bool) -> Iterator[None]:
        """Within it, C++ code computes on the device, or does not."""
        before = self.is_within
        self.is_within = is_on_device
        try:
            yield
        finally:
            self.is_within = before


_BUILT_IN = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)


class FakeDevice(TorchFunctionMode):
    """Within it, `cuda:0` exists.

    waits: what the host waited for. launches: operations that ran on the device, by name. stage: a
    label for what comes.
    """

    active: "FakeDevice | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.launches: collections.Counter[str] = collections.Counter()
        self.stage = ""
        self._own_to_thread = threading.local()
        self._pinned: dict[int, torch.Tensor] = {}
        self._parameters: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "FakeDevice":
        assert FakeDevice.active is None, "fake devices do not nest"
        FakeDevice.active = self
        OnDevice.observe = self.observe
        for patch in [*driver_patches(self), *_patches(self)]:
            self._stack.enter_context(patch)
        self._stack.enter_context(self.made_within)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()
        OnDevice.observe = None
        FakeDevice.active = None

    @property
    def made_within(self) -> _MadeWithin:
        """What tells operations on the device from others in this thread."""
        if not hasattr(self._own_to_thread, "made_within"):
            self._own_to_thread.made_within = _MadeWithin()
        return self._own_to_thread.made_within

    @contextmanager
    def counting(self) -> Iterator[SimpleNamespace]:
        """Yield what happens within it alone: `waits` and `launches`, filled in at its end."""
        found = SimpleNamespace(waits=[], launches=0)
        first_wait = len(self.waits)
        launches = self.launches.total()
        yield found
        found.waits = self.waits[first_wait:]
        found.launches = self.launches.total() - launches

    # ---- what operations do

    def observe(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Check where the tensors of an operation are, and record what it costs. Raises MixedDevices."""
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        host = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
        if host and name not in _MAY_MIX:
            where = ", ".join(f"{'cuda:0' if isinstance(x, OnDevice) else 'cpu'} {list(x.shape)}" for x in tensors)
            raise MixedDevices(f"{name} reads tensors of several devices: {where}")
        if name in _READS_BACK:
            self.wait(_READS_BACK[name])
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait("repeat_interleave without output_size")
        elif name in ("copy_", "_copy_from"):
            self._copies(args, kwargs)
        elif name in _MAY_MIX:
            self._indexes(name, args)
        if name not in _LAUNCHES_NOTHING and not _is_view(func):
            self.launches[name] += 1

    def _copies(self, args: tuple, kwargs: dict) -> None:
        into, source = args[:2]
        is_asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if isinstance(into, OnDevice) and not isinstance(source, OnDevice) and source.dim() > 0:
            self.copies_to_device(source, is_asynchronous)
        if not isinstance(into, OnDevice) and isinstance(source, OnDevice) and not (is_asynchronous and self.is_pinned(into)):
            self.wait("copy to the host")

    def _indexes(self, name: str, args: tuple) -> None:
        if not isinstance(args[0], OnDevice):
            raise MixedDevices(f"{name} of a tensor on the host by indices, or with values, on the device")
        indices = [index for index in args[1] if index is not None]
        sets_a_number = name != "index" and len(args) > 2 and args[2].numel() == 1
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not sets_a_number:
            self.wait("boolean index")
        if any(not isinstance(index, OnDevice) and index.dim() > 0 for index in indices):
            self.wait("pageable copy to the device")

    def wait(self, kind: str) -> None:
        """Record that the host waits for the device here."""
        own = _frame_within([ROOT / "engine", ROOT / "launcher"])
        outside = _frame_within([PACKAGES], besides=(f"{PACKAGES / 'torch'}{os.sep}",))
        package = ""
        if outside is not None and (own is None or _is_called_by(outside, own)):
            package = _relative(outside.f_code.co_filename, PACKAGES)
        frame = own or _frame_within([ROOT / "tests"], besides=_OWN_FILES) or outside
        if frame is None:
            self.waits.append(Wait(kind, "unknown:0", "unknown", package, self.stage))
            return
        place = f"{_relative(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}"
        self.waits.append(Wait(kind, place, frame.f_code.co_name, package, self.stage))

    # ---- memory of the host that the device can read by itself

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor of the host, in pinned memory."""
        assert not isinstance(x, OnDevice), "only tensors of the host can be pinned"
        pinned = x if self.is_pinned(x) else x.clone()
        self._pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def is_pinned(self, x: torch.Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._pinned

    def copies_to_device(self, source: torch.Tensor, is_asynchronous: bool) -> None:
        """Record a copy from the host; only one from pinned memory that is not asked to block lets the host go on."""
        if source.numel() == 0:
            return
        if not self.is_pinned(source):
            self.wait("pageable copy to the device")
        elif not is_asynchronous:
            self.wait("blocking copy to the device")

    # ---- parameters that several modules share stay shared when their modules move

    def moved_parameter(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return what this parameter became when it was moved for another module."""
        kept, moved = self._parameters.get(id(x), (None, None))
        return moved if kept is x else None

    def keep_moved(self, x: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """Remember what a parameter becomes, and return it."""
        if isinstance(x, torch.nn.Parameter):
            self._parameters[id(x)] = x, moved
        return moved

    # ---- what callers ask of PyTorch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if FakeDevice.active is not self:  # in a thread that outlives it
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        special = _SPECIAL.get(name)
        if special is not None:
            return special(self, func, args, kwargs)
        if _is_device(kwargs.get("device")):
            with self.made_within.operation(is_on_device=False):
                return self._makes(name, func, args, kwargs)
        if kwargs.get("pin_memory"):
            kwargs.pop("pin_memory")
            return self.pin(func(*args, **kwargs))
        on_device = isinstance(func, _BUILT_IN) and any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
        with self.made_within.operation(on_device):
            return func(*args, **kwargs)

    def _makes(self, name: str, func, args: tuple, kwargs: dict) -> Any:
        """A factory that was asked for a tensor on the device."""
        kwargs["device"] = torch.device("cpu")
        made = func(*args, **kwargs)
        if not isinstance(made, torch.Tensor) or isinstance(made, OnDevice):
            return made
        if name in _FACTORIES_FROM_HOST and not any(isinstance(leaf, OnDevice) for leaf in tree_leaves(args)):
            self.copies_to_device(made, is_asynchronous=False)
        if name not in _FACTORIES_WITHOUT_LAUNCH:
            self.launches[name] += 1
        moved = OnDevice.holding(made.detach())
        return moved.requires_grad_() if made.requires_grad else moved


def _is_device(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _to(fake: FakeDevice, func, args: tuple, kwargs: dict) -> torch.Tensor:
    """`Tensor.to` in all its forms."""
    x, *rest = args
    if rest and isinstance(rest[0], torch.Tensor):
        other = rest[0]
        rest = [other.device, other.dtype, *rest[1:]]
    if rest and not isinstance(rest[0], torch.dtype | bool):
        device, *rest = rest
    else:
        device = kwargs.pop("device", None)
    if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
        dtype, *rest = rest
    else:
        dtype = kwargs.pop("dtype", None)
    non_blocking = rest[0] if rest else kwargs.pop("non_blocking", False)
    copy = rest[1] if len(rest) > 1 else kwargs.pop("copy", False)
    dtype = dtype or x.dtype
    onto_device = isinstance(x, OnDevice) if device is None else _is_device(device)
    if device is not None and torch.device(device).type == "meta":
        return torch.empty_like(values_of(x), dtype=dtype, device="meta")
    if onto_device == isinstance(x, OnDevice):
        return func(x, dtype, non_blocking, copy)
    return _Moved.apply(x, onto_device, dtype, non_blocking)


class _Moved(torch.autograd.Function):
    """A copy to the other device, whose gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, onto_device: bool, dtype: torch.dtype, non_blocking: bool) -> torch.Tensor:
        ctx.dtype = x.dtype
        ctx.onto_device = onto_device
        return _moved(x, onto_device, dtype, non_blocking)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _moved(grad, not ctx.onto_device, ctx.dtype, False), None, None, None


def _moved(x: torch.Tensor, onto_device: bool, dtype: torch.dtype, non_blocking: bool) -> torch.Tensor:
    fake = FakeDevice.active
    known = fake.moved_parameter(x) if onto_device else None
    if known is not None and known.dtype == dtype:
        return known
    fake.launches["copy between devices"] += 1
    values = values_of(x).detach().to(dtype, copy=True)
    if onto_device:
        fake.copies_to_device(x, non_blocking)
        return fake.keep_moved(x, OnDevice.holding(values))
    fake.wait("copy to the host")
    return values


def _cpu(fake: FakeDevice, func, args: tuple, kwargs: dict) -> torch.Tensor:
    return _to(fake, torch.Tensor.to, (args[0], torch.device("cpu")), {})


def _cuda(fake: FakeDevice, func, args: tuple, kwargs: dict) -> torch.Tensor:
    return _to(
        fake,
        torch.Tensor.to,
        (args[0], DEVICE),
        {"non_blocking": kwargs.get("non_blocking", False)},
    )


def _tolist(fake: FakeDevice, func, args: tuple, kwargs: dict) -> list:
    if isinstance(args[0], OnDevice):
        fake.wait("tolist")
    return values_of(args[0]).tolist()


def _pin_memory(fake: FakeDevice, func, args: tuple, kwargs: dict) -> torch.Tensor:
    return fake.pin(args[0])


def _is_pinned(fake: FakeDevice, func, args: tuple, kwargs: dict) -> bool:
    return not isinstance(args[0], OnDevice) and fake.is_pinned(args[0])


class _Resumed:
    """Within it, a mode that is serving a call is in force again."""

    def __init__(self, fake: FakeDevice) -> None:
        self._fake = fake

    def __enter__(self) -> None:
        TorchFunctionMode.__enter__(self._fake)

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self._fake, *error)


_SPECIAL = {
    "to": _to,
    "cpu": _cpu,
    "cuda": _cuda,
    "tolist": _tolist,
    "pin_memory": _pin_memory,
    "is_pinned": _is_pinned,
}


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)


# ---- how PyTorch is made to take part


def _patches(fake: FakeDevice) -> list:
    """Keep the device in force in backward passes, in threads, and when modules move."""
    run_thread = threading.Thread.run

    def run_on_device(thread: threading.Thread) -> None:
        with _Resumed(fake), fake.made_within:
            run_thread(thread)

    run_backward = torch.autograd._engine_run_backward

    def resumed_backward(*args: Any, **kwargs: Any) -> Any:
        # PyTorch suspends a mode while it serves a call, here `Tensor.backward`.
        resumed = nullcontext() if fake in _get_current_function_mode_stack() else _Resumed(fake)
        with resumed, fake.made_within.operation(is_on_device=True):
            return run_backward(*args, **kwargs)

    # A module that moves gets new parameters: data of the device cannot take a plain tensor's place.
    future = torch.__future__
    return [
        mock.patch.object(threading.Thread, "run", run_on_device),
        mock.patch.object(torch.autograd, "_engine_run_backward", resumed_backward),
        mock.patch.object(future, "get_overwrite_module_params_on_conversion", lambda: True),
    ]


# ---- where in the sources something happens


def _frame_within(folders: list[Path], besides: tuple[str, ...] = ()) -> FrameType | None:
    """Return the innermost frame whose file lies in one of the folders, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(besides) and any(name.startswith(f"{folder}{os.sep}") for folder in folders):
            return frame
        frame = frame.f_back
    return None


def _is_called_by(inner: FrameType, outer: FrameType) -> bool:
    """Whether `outer` called `inner`, directly or not."""
    frame = inner.f_back
    while frame is not None:
        if frame is outer:
            return True
        frame = frame.f_back
    return False


def _relative(name: str, folder: Path) -> str:
    return str(Path(name).relative_to(folder)) if name.startswith(str(folder)) else name
