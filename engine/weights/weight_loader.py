"""Load a checkpoint, or a rank's part of it, directly to the device of a model.

The model is on the meta device until its weights are loaded, parameter by parameter. Transformers'
conversion rules map names and fused or per-expert layouts. Of a weight that is cut, only this
rank's rows, columns or experts are read.
"""

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)

from engine.models.target_families import num_layers, text_config
from engine.parallel.rules import ShardSpec
from engine.weights.quantised_weight import QuantisedWeight, plain_tensor
from engine.weights.weight_reader import Checkpoint, MisfitError

OF_EXPERT = re.compile(r"\.experts\.(\d+)\.")
OF_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Tensors of published checkpoints that no model here needs: rotary tables, scales of a quantised
# cache and of inputs, and multi-token-prediction modules.
NEVER_READ = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.[kv]_scale$|\.input_scale$|(^|\.)mtp(_\w+)?\.")
NUM_MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
THREADS = 2  # each holds one tensor in addition to those already loaded

# Maps a total and its unit to a progress bar with `move_to(done, text)`.
Bar = Callable[[int, str], AbstractContextManager]


@dataclass(frozen=True)
class _Parameter:
    """Checkpoint tensors and conversion rule of one or several parameters."""

    names: tuple[str, ...]
    sources: tuple[tuple[str, str | None], ...]  # name in the checkpoint, matching pattern
    rule: WeightConverter | None


def load_cut(
    model: PreTrainedModel,
    cuts: Mapping[str, ShardSpec],
    checkpoint: Checkpoint,
    device: torch.device,
    bar: Bar | None = None,
    wrapper: PreTrainedModel | None = None,
    dropped: Collection[str] = (),
) -> None:
    """Load the weights of a model on the meta device, in its parameters' precision or quantised.

    The host holds at most two checkpoint tensors in addition to the loaded weights.
    cuts: parts of weights that this rank loads, by name; others are loaded whole.
    bar: progress bar over bytes.
    wrapper: a larger model on the meta device that contains this one. Checkpoint tensors for the
    rest of it are ignored.
    dropped: names of weights that were removed from the model. They are ignored as well.
    Raises MisfitError before any tensor is read. It lists all tensors that are missing, unknown, of
    a wrong shape, or stored as codes without a known scale.
    """
    keep_in_float32(model)
    whole = model.state_dict()
    plan = _fitting_plan(model, whole, checkpoint, wrapper, dropped)

    def load(parameter: _Parameter) -> int:
        num_bytes = 0
        for name, tensor in _read(parameter, cuts, checkpoint, model, device).items():
            tensor = _held(tensor, name, checkpoint, model, device).contiguous()
            _put(model, name, tensor)
            num_bytes += tensor.nbytes
        return num_bytes

    sizes = [sum(own_bytes(whole[name], cuts.get(name)) for name in parameter.names) for parameter in plan]
    done = 0
    held = 0
    start = time.perf_counter()
    with bar(sum(sizes), "bytes") if bar else nullcontext() as progress, ThreadPoolExecutor(THREADS) as pool:
        for size, num_bytes in zip(sizes, pool.map(load, plan), strict=True):
            done, held = done + size, held + num_bytes  # less than `size` for quantised weights
            if progress:
                rate = held / (time.perf_counter() - start) / 1e9
                progress.move_to(done, f"bytes of weights, {rate:.2f} GB/s")
    there = {name for parameter in plan for name in parameter.names}
    _complete(model, device, missing=set(whole) - there)


def check_fit(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    wrapper: PreTrainedModel | None = None,
    dropped: Collection[str] = (),
) -> None:
    """Raise MisfitError if `load_cut` would raise it. Reads only names, shapes and dtypes."""
    _fitting_plan(model, model.state_dict(), checkpoint, wrapper, dropped)


def _fitting_plan(
    model: PreTrainedModel,
    whole: dict[str, Tensor],
    checkpoint: Checkpoint,
    wrapper: PreTrainedModel | None,
    dropped: Collection[str],
) -> list["_Parameter"]:
    plan, problems = _plan(model, whole, checkpoint, wrapper, dropped)
    if problems:
        raise MisfitError(checkpoint.path, problems)
    return plan


def keep_in_float32(model: PreTrainedModel) -> None:
    """Set weights and buffers of a model on the meta device to float32 if its family requires that.

    `from_pretrained` does the same. For example, a router whose bias is rounded to bfloat16 would
    choose other experts.
    """
    wanted = model._get_dtype_plan(model.dtype)
    if not wanted:
        return
    pattern, group_of, _ = build_glob_alternation(list(wanted))
    for name, tensor in model.state_dict(keep_vars=True).items():
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None and tensor.is_floating_point():
            dtype = wanted[group_of[match.lastgroup]]
            tensor.data = tensor.data.to(dtype)


def _put(model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # read by Transformers


def own_bytes(tensor: Tensor, cut: ShardSpec | None) -> int:
    """Return the bytes of this rank's part of a tensor."""
    if cut is None or cut.zeros:
        return tensor.nbytes
    return tensor.nbytes * sum(stop - start for start, stop in cut.intervals) // tensor.shape[cut.dim]


class _Names:
    """Mapping from a checkpoint's names to a model's names, by Transformers' conversion rules."""

    def __init__(self, model: PreTrainedModel, whole: dict[str, Tensor]) -> None:
        rules = get_model_conversion_mapping(model)
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._model = model
        self._whole = whole

    def of(self, key: str) -> tuple[str, str | None]:
        """Return the model's name for a key, and the pattern of the rule that matches it.

        The model need not have a weight of this name.
        """
        name, pattern = rename_source_key(key, self._renamings, self.converters, self._model.base_model_prefix, self._whole)
        if name not in self._whole and key in self._whole:  # matched by another layout's rule
            return key, None
        return name, pattern


def _plan(
    model: PreTrainedModel,
    whole: dict[str, Tensor],
    checkpoint: Checkpoint,
    wrapper: PreTrainedModel | None,
    dropped: Collection[str],
) -> tuple[list[_Parameter], list[str]]:
    """Return what to read for each parameter, and a message per tensor that does not fit."""
    names = _Names(model, whole)
    by_pattern = {pattern: rule for rule in names.converters for pattern in rule.source_patterns}
    elsewhere = _Elsewhere(model, wrapper, dropped)
    sources: dict[str, list[tuple[str, str | None]]] = {}
    problems: list[str] = []
    for key in checkpoint:
        name, pattern = names.of(key)
        if name in whole:
            sources.setdefault(name, []).append((key, pattern))
            if whole[name].is_floating_point() and not checkpoint.is_understood(key):
                stored = checkpoint.stored_dtype(key)
                problems.append(f"{key}: is stored as {stored}, without a scale in a layout that is known")
        elif not elsewhere.has(key, name):
            problems.append(f"{key}: no such weight")
    plan = []
    for name, found in sources.items():
        first_key, first_pattern = found[0]
        rule = None if first_pattern is None else by_pattern.get(first_pattern)
        targets = rule.target_patterns if rule else [name]
        made = tuple(name.replace(targets[0], target) for target in targets)
        shape = checkpoint.shape(first_key)
        expected = list(whole[name].shape)
        if rule is None and len(found) > 1:
            problems.append(f"{' and '.join(key for key, _ in found)}: are both {name}")
        if rule is None and shape != expected:
            problems.append(f"{first_key}: has shape {shape}, the config says {expected}")
        plan.append(_Parameter(made, tuple(found), rule))
    there = {name for parameter in plan for name in parameter.names}
    missing = sorted(set(whole) - there - _tied_to(model, there))
    return plan, [f"{name}: missing" for name in missing] + problems


class _Elsewhere:
    """Checkpoint tensors that a model does not need.

    They belong to its wrapper, or to towers and layers that the model does not build.
    """

    def __init__(self, model: PreTrainedModel, wrapper: PreTrainedModel | None, dropped: Collection[str]) -> None:
        self._patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        self._patterns.append(NEVER_READ)
        config = text_config(model.config)
        # They are numbered after the decoder's layers, and Transformers does not build them.
        num_mtp_layers = max(getattr(config, name, None) or 0 for name in NUM_MTP_LAYERS)
        own = num_layers(config)
        self._mtp_layers = range(own, own + num_mtp_layers)
        self._dropped = set(dropped)
        self._of_wrapper = {} if wrapper is None else wrapper.state_dict()
        self._names = None if wrapper is None else _Names(wrapper, self._of_wrapper)

    def has(self, key: str, name: str) -> bool:
        """Return whether a tensor is not needed.

        key: name in the checkpoint.
        name: name that the model's conversion rules give it.
        """
        if name in self._dropped or any(pattern.search(key) for pattern in self._patterns):
            return True
        if self._names is not None and self._names.of(key)[0] in self._of_wrapper:
            return True
        layer = OF_LAYER.search(key)
        return layer is not None and int(layer[1]) in self._mtp_layers


def _tied_to(model: PreTrainedModel, there: Collection[str]) -> set[str]:
    """Return the names of weights that are tied to a weight in the checkpoint."""
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    tied: set[str] = set()
    for target, source in pairs.items():
        partners = {source} | {other for other, of in pairs.items() if of == source}
        if partners & set(there):
            tied |= partners | {target}
    return tied


def _read(
    parameter: _Parameter, cuts: Mapping[str, ShardSpec], checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device
) -> dict[str, Tensor]:
    first = parameter.names[0]
    cut = cuts.get(first)
    if parameter.rule is None:
        ((key, _),) = parameter.sources
        tensor = checkpoint.read(key, cut)
        return {first: cut.of(tensor) if cut is not None and cut.zeros else tensor}
    experts: dict[int, list[tuple[str, str | None]]] = {}
    for key, pattern in parameter.sources:
        if number := OF_EXPERT.search(key):
            experts.setdefault(int(number[1]), []).append((key, pattern))
    if not experts:
        converted = _converted(parameter.rule, first, parameter.sources, checkpoint, model)
        return {name: cuts[name].of(tensor) if name in cuts else tensor for name, tensor in converted.items()}
    own = sorted(experts)
    cut_of_each = cut
    if cut is not None and not cut.zeros and cut.dim == 0:
        own = [expert for start, stop in cut.intervals for expert in range(start, stop)]
        cut_of_each = None
    together: Tensor | None = None
    for place, expert in enumerate(own):
        part = _converted(parameter.rule, first, experts[expert], checkpoint, model)[first]
        part = part if cut_of_each is None else cut_of_each.of(part)
        part = _held(part, first, checkpoint, model, device)
        if together is None:
            together = part.new_empty(len(own), *part.shape[1:])
        together[place] = part[0]
    assert together is not None, f"this rank holds no expert of {first}"
    return {first: together}


def _converted(
    rule: WeightConverter,
    name: str,
    sources: Sequence[tuple[str, str | None]],
    checkpoint: Checkpoint,
    model: PreTrainedModel,
) -> dict[str, Tensor]:
    """Apply a conversion rule to some of its tensors, and return the parameters by name.

    sources: keys and patterns of the tensors; all, or those of a single expert.
    name: the first parameter of the rule.
    """
    rule = deepcopy(rule)
    for key, pattern in sources:
        assert pattern is not None, f"{key} is converted, so it fits a pattern"
        tensor = checkpoint.read(key)
        rule.add_tensor(name, key, pattern, tensor)  # type: ignore[arg-type]  # declared for futures, and takes tensors too
    made = rule.convert(name, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _held(tensor: Tensor, name: str, checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device) -> Tensor:
    """Return a weight as the model stores it: in its parameter's precision, or quantised.

    A weight may stay quantised only if the model uses it only as a factor of products.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(tensor, QuantisedWeight):
        is_factor = tensor.ndim == 3 or (isinstance(owner, nn.Linear) and owner is not model.get_output_embeddings())
        stays_quantised = is_factor and checkpoint.keeps(tensor)
        tensor = tensor.to(device)
        tensor = tensor if stays_quantised else plain_tensor(tensor)
    # Copy to the device first: it converts faster, and the host needs no memory for the result.
    return tensor.to(device).to(getattr(owner, leaf).dtype)


def _complete(model: PreTrainedModel, device: torch.device, missing: set[str]) -> None:
    """Fill in what no checkpoint holds: buffers that follow from the config, and tied weights.

    missing: names that are not in the checkpoint. Weights that the config ties, but that the
    checkpoint stores separately, stay untied.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    if hasattr(model, "all_tied_weights_keys"):
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    else:
        model.tie_weights()
    model.initialize_weights()
