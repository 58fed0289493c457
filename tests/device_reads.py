"""Count what makes the host wait for a device: reading values, and results whose sizes depend on values."""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READERS = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")
OF_UNKNOWN_SIZE = ("nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount", "_local_scalar_dense")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class DeviceReads(TorchDispatchMode):
    """While active, notes by name whatever would wait for the device if its tensors were on one. names: in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._inside = False
        self._patches = ExitStack()

    def __enter__(self) -> "DeviceReads":
        for name in READERS:
            self._patches.enter_context(mock.patch.object(Tensor, name, self._noted(name, getattr(Tensor, name))))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _noted(self, name: str, inner: Any) -> Any:
        def noted(tensor: Tensor, *arguments: Any) -> Any:
            if not self._inside:
                self.names.append(name)
            before = self._inside
            self._inside = True
            try:
                return inner(tensor, *arguments)
            finally:
                self._inside = before

        return noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if not self._inside and (name in OF_UNKNOWN_SIZE or by_mask or repeats):
            self.names.append(name)
        return function(*args, **(kwargs or {}))
