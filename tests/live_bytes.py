"""How many bytes of tensors live at once, whoever made them."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, adds up the storages that operations made and that are still alive; `peak`: the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x.is_meta and (storage := x.untyped_storage())._cdata not in given:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Of what is alive at this moment."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return sum(num_bytes for _, num_bytes in self._storages.values())
