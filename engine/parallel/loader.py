"""A rank's part of a checkpoint: built on the meta device, then read slice by slice from safetensors files.

Names, fused and per-expert layouts are mapped by Transformers' own conversion rules. Of an expert's tensors only those of own
experts are read, of a weight that is cut only own rows or columns.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from engine.parallel.quantised_weight import QuantisedWeight
from engine.parallel.rules import Cut

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OF_EXPERT = re.compile(r"\.experts\.(\d+)\.")
THREADS = 2  # each holds a tensor beside those that are in their place
SHOWN = 20

Bar = Callable[[int, str], AbstractContextManager]  # over so many units: an object with `move_to(done, text)`


class Checkpoint:
    """The tensors of a folder or hub repository, by name; nothing is read until it is asked for.

    stays_quantised: whether linear maps and experts are held as quantised as they are read.
    """

    stays_quantised = False

    def __init__(self, path: str, revision: str | None = None) -> None:
        """Raises ValueError if it holds no safetensors file."""

        def find(name: str) -> str | None:
            return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

        if index := find(INDEX):
            by_name = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            files = {name: find(name) for name in set(by_name.values())}
            if missing := sorted(name for name, file in files.items() if file is None):
                raise ValueError(f"target.path={path}: files of {INDEX} are missing: {', '.join(missing[:SHOWN])}")
        elif single := find(SINGLE):
            files = {SINGLE: single}
            with safe_open(single, "pt") as file:
                by_name = dict.fromkeys(file.keys(), SINGLE)
        else:
            problem = f"neither {SINGLE} nor {INDEX} is there; a target that is shared or quantised is read from these"
            raise ValueError(f"target.path={path}: {problem}")
        self._open = {name: safe_open(file, "pt") for name, file in files.items()}
        self._by_name = by_name

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._by_name))

    def shape(self, name: str) -> list[int]:
        return self._open[self._by_name[name]].get_slice(name).get_shape()

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """A tensor, or a rank's part of it."""
        file = self._open[self._by_name[name]]
        if cut is None or cut.zeros:
            return file.get_tensor(name)
        lazy, before = file.get_slice(name), (slice(None),) * cut.dim
        parts = [lazy[(*before, slice(start, stop))] for start, stop in cut.intervals]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=cut.dim)


@dataclass(frozen=True)
class _Parameter:
    """How a parameter, or several that one rule makes of the same tensors, come out of a checkpoint."""

    names: tuple[str, ...]
    sources: tuple[tuple[str, str | None], ...]  # checkpoint name, and the pattern of the rule that it fits
    rule: WeightConverter | None


def load_cut(
    model: PreTrainedModel,
    cuts: Mapping[str, Cut],
    checkpoint: Checkpoint,
    device: torch.device,
    bar: Bar | None = None,
    wrapper: PreTrainedModel | None = None,
) -> None:
    """Give a model on the meta device its weights, those with a cut in part, in the precision they have there, or quantised.

    wrapper: a model on the meta device that holds more than this one; what a checkpoint has for the rest is passed over.
    Beside what stays, the host holds two tensors of the checkpoint at most. Raises ValueError that lists all tensors that are
    missing, misshaped or not known, before any is read.
    """
    whole = model.state_dict()
    plan, problems = _plan(model, whole, checkpoint, wrapper)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError("\n  ".join(["the checkpoint does not fit the target's config:", *problems[:SHOWN], *more]))

    def load(parameter: _Parameter) -> int:
        num_bytes = 0
        for name, tensor in _read(parameter, cuts, checkpoint, model, device).items():
            tensor = _held(tensor, name, checkpoint, model, device).contiguous()
            _put(model, name, tensor)
            num_bytes += tensor.nbytes
        return num_bytes

    sizes = [sum(own_bytes(whole[name], cuts.get(name)) for name in parameter.names) for parameter in plan]
    done, held, start = 0, 0, time.perf_counter()
    with bar(sum(sizes), "bytes") if bar else nullcontext() as progress, ThreadPoolExecutor(THREADS) as pool:
        for size, num_bytes in zip(sizes, pool.map(load, plan), strict=True):
            done, held = done + size, held + num_bytes  # fewer are held than the model has where they stay quantised
            if progress:
                rate = held / (time.perf_counter() - start) / 1e9
                progress.move_to(done, f"bytes of weights, {rate:.2f} GB/s")
    _complete(model, device)


def _put(model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor
    tensor._is_hf_initialized = True


def own_bytes(tensor: Tensor, cut: Cut | None) -> int:
    """Of a rank's part."""
    if cut is None or cut.zeros:
        return tensor.nbytes
    return tensor.nbytes * sum(stop - start for start, stop in cut.intervals) // tensor.shape[cut.dim]


class _Names:
    """What a model calls the tensors of a checkpoint, by Transformers' conversion rules."""

    def __init__(self, model: PreTrainedModel, whole: Mapping[str, Tensor]) -> None:
        rules = get_model_conversion_mapping(model)
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._model, self._whole = model, whole

    def of(self, key: str) -> tuple[str, str | None]:
        """The name, whether there is such a weight or not, and the pattern of the rule that the key fits."""
        name, pattern = rename_source_key(key, self._renamings, self.converters, self._model.base_model_prefix, self._whole)
        if name not in self._whole and key in self._whole:  # a rule for another layout fits it by chance
            return key, None
        return name, pattern


def _plan(
    model: PreTrainedModel, whole: Mapping[str, Tensor], checkpoint: Checkpoint, wrapper: PreTrainedModel | None
) -> tuple[list[_Parameter], list[str]]:
    """What to read for each parameter, and what does not fit."""
    names = _Names(model, whole)
    elsewhere = {} if wrapper is None else wrapper.state_dict()
    wrapper_names = None if wrapper is None else _Names(wrapper, elsewhere)
    by_pattern = {pattern: rule for rule in names.converters for pattern in rule.source_patterns}
    sources: dict[str, list[tuple[str, str | None]]] = {}
    problems, ignored = [], [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for key in checkpoint:
        name, pattern = names.of(key)
        if name in whole:
            sources.setdefault(name, []).append((key, pattern))
        elif wrapper_names is not None and wrapper_names.of(key)[0] in elsewhere:
            continue
        elif not any(pattern.search(key) for pattern in ignored):
            problems.append(f"{key}: no such weight")
    plan = []
    for name, found in sources.items():
        rule = by_pattern.get(found[0][1])
        targets = rule.target_patterns if rule else [name]
        made = tuple(name.replace(targets[0], target) for target in targets)
        if rule is None and checkpoint.shape(found[0][0]) != list(whole[name].shape):
            shape, expected = checkpoint.shape(found[0][0]), list(whole[name].shape)
            problems.append(f"{found[0][0]}: has shape {shape}, the config says {expected}")
        plan.append(_Parameter(made, tuple(found), rule))
    there = {name for parameter in plan for name in parameter.names}
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else set()
    missing = sorted(set(whole) - there - tied)
    return plan, [f"{name}: missing" for name in missing] + problems


def _read(
    parameter: _Parameter, cuts: Mapping[str, Cut], checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device
) -> dict[str, Tensor]:
    first = parameter.names[0]
    if parameter.rule is None:
        cut, ((key, _),) = cuts.get(first), parameter.sources
        tensor = checkpoint.read(key, cut)
        return {first: cut.of(tensor) if cut is not None and cut.zeros else tensor}
    experts: dict[int, list[tuple[str, str | None]]] = {}
    for key, pattern in parameter.sources:
        if number := OF_EXPERT.search(key):
            experts.setdefault(int(number[1]), []).append((key, pattern))
    if not experts:
        converted = _converted(parameter, parameter.sources, checkpoint, model)
        return {name: cuts[name].of(tensor) if name in cuts else tensor for name, tensor in converted.items()}
    cut = cuts.get(first)
    of_experts = cut is not None and not cut.zeros and cut.dim == 0
    own = sorted(experts) if not of_experts else [e for start, stop in cut.intervals for e in range(start, stop)]
    together = None
    for place, expert in enumerate(own):
        part = _converted(parameter, experts[expert], checkpoint, model)[first]
        part = cut.of(part) if cut is not None and not of_experts else part
        part = _held(part, first, checkpoint, model, device)
        together = part.new_empty(len(own), *part.shape[1:]) if together is None else together
        together[place] = part[0]
    return {first: together}


def _converted(
    parameter: _Parameter, sources: Sequence[tuple[str, str | None]], checkpoint: Checkpoint, model: PreTrainedModel
) -> dict[str, Tensor]:
    """What the rule makes of some of its tensors, one at a time where they are an expert's."""
    rule = deepcopy(parameter.rule)
    for key, pattern in sources:
        rule.add_tensor(parameter.names[0], key, pattern, checkpoint.read(key))
    made = rule.convert(parameter.names[0], model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _held(tensor: Tensor, name: str, checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device) -> Tensor:
    """A weight as it stays: in its parameter's precision, or quantised where a product is all that is made of it."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(tensor, QuantisedWeight):
        is_factor = tensor.ndim == 3 or (isinstance(owner, nn.Linear) and owner is not model.get_output_embeddings())
        tensor = tensor.to(device)
        tensor = tensor if checkpoint.stays_quantised and is_factor else tensor.dequantised()
    return tensor.to(device, getattr(owner, leaf).dtype)


def _complete(model: PreTrainedModel, device: torch.device) -> None:
    """What no checkpoint holds: buffers that follow from the config, and tied weights."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    model.tie_weights()
    model.initialize_weights()
