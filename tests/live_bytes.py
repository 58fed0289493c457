"""How many bytes of tensors live at once, whoever made them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """While active, adds up the storages that operations made and that are still alive; `peak`: the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages = {}
        self._most = 0  # no less than what lives: storages that ended since the last look are still in it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for x in _tensors(result):
            if not x.is_meta and (storage := x.untyped_storage())._cdata not in given:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._most += storage.nbytes()
        if self._most > self.peak:  # else looking at every storage could raise no peak
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Of what is alive at this moment."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self._most = sum(num_bytes for _, num_bytes in self._storages.values())
        return self._most


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Those in the arguments or the result of an operation; PyTorch's own walk takes longer than most operations do."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)
