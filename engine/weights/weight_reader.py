"""Reading of a checkpoint's tensors, whole or in parts, from safetensors or `.bin` files."""

import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.host.weight_index import FETCH_AGAIN, SHOWN
from engine.parallel.rules import ShardSpec
from engine.weights.quantised_weight import QuantisedWeight
from engine.weights.weight_files import find_weight_files

FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors names them


class MisfitError(ValueError):
    """Raised if a checkpoint's tensors are not those of the model that its config describes."""

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        shown = list(problems)
        if len(problems) > SHOWN:  # show both ends: missing tensors come first, unknown ones last
            half = SHOWN // 2
            shown = [*problems[:half], f"... {len(problems) - SHOWN} more ...", *problems[-half:]]
        heading = f"target.path={path}: the checkpoint does not fit the target's config"
        advice = "Fetch the checkpoint again, or name the revision that its config.json belongs to."
        super().__init__("\n  ".join([f"{heading}:", *shown]) + f"\n{advice}")


class PickledFile:
    """A PyTorch file (`.bin`) with the interface of `safe_open`; zip archives are memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Open a file. Raises ValueError if it cannot be read or does not hold a dict."""
        try:
            is_archive = zipfile.is_zipfile(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            first_line = str(error).partition("\n")[0]
            raise ValueError(f"{path} cannot be read ({first_line}); {FETCH_AGAIN}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds a {type(found).__name__}; expected tensors by name")
        self._tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> "PickledSlice":
        return PickledSlice(self._tensors[name])


class PickledSlice:
    """A tensor of a `PickledFile` with the interface of a slice from `safe_open`."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        kind = self._tensor.dtype
        if kind == torch.bfloat16:
            return "BF16"
        letter = "F" if kind.is_floating_point else "I"
        return f"{letter}{8 * kind.itemsize}"

    def __getitem__(self, place: Any) -> Tensor:
        return self._tensor[place]


class Checkpoint:
    """The tensors of a folder or hub repository by name, read on request.

    keep: which linear maps and experts stay quantised in memory; see `target.keep_quantised`.
    """

    keep = "none"

    def __init__(self, path: str, revision: str | None = None) -> None:
        """Open the files of a checkpoint.

        Raises ValueError if there are no weights, or if a file is missing, cut off or a git-lfs
        pointer.
        Raises MisfitError if tensors in the index are not in their files.
        """
        self.path = path
        files = find_weight_files(path, revision)
        files.check()
        self._open = {name: _open_file(file, files.is_safetensors) for name, file in files.paths.items()}
        self._by_name: dict[str, str] = {}
        for name, file in self._open.items():
            self._by_name |= dict.fromkeys(file.keys(), name)
        if files.index is not None:
            named = files.index.items()
            absent = [f"{tensor}: not in {name}" for tensor, name in named if tensor not in self._by_name]
            if absent:
                raise MisfitError(path, sorted(absent))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._by_name))

    def shape(self, name: str) -> list[int]:
        return self._open[self._by_name[name]].get_slice(name).get_shape()

    def stored_dtype(self, name: str) -> str:
        """Return the dtype that a tensor is stored in, as safetensors names it, such as `BF16` or `F8_E4M3`."""
        return self._open[self._by_name[name]].get_slice(name).get_dtype()

    def keeps(self, weight: QuantisedWeight) -> bool:
        """Return whether a weight that was read quantised may stay quantised."""
        is_fp8 = weight.codes.dtype == torch.float8_e4m3fn
        return self.keep == "all" or (self.keep == "fp8" and is_fp8)

    def is_understood(self, name: str) -> bool:
        """Return whether the stored tensor is the weight itself, or codes with a known scale."""
        return name not in self._by_name or self.stored_dtype(name) in FLOATS

    def read(self, name: str, cut: ShardSpec | None = None) -> Tensor:
        """Read a tensor, or this rank's part of it."""
        file = self._open[self._by_name[name]]
        if cut is None or cut.zeros:
            return file.get_tensor(name)
        lazy = file.get_slice(name)
        before = (slice(None),) * cut.dim
        parts = [lazy[(*before, slice(start, stop))] for start, stop in cut.intervals]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=cut.dim)


def _open_file(path: Path, is_safetensors: bool) -> Any:
    if not is_safetensors:
        return PickledFile(path)
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); {FETCH_AGAIN}") from error


def own_part(weight: Tensor, cut: ShardSpec | None) -> Tensor:
    """Return this rank's part of a weight. From memory-mapped files, only this part is read."""
    return weight if cut is None or cut.zeros else cut.of(weight)
