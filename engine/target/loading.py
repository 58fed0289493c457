"""Reading a target: weights straight to the device, or only names and shapes to check their fit."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from engine.config.sections import TargetSection
from engine.parallel.mesh import TargetMesh
from engine.parallel.plan import TargetPlan
from engine.parallel.rules import ShardSpec
from engine.target.configuration import load_target_config
from engine.target.structure import (
    auto_class,
    decoder_of,
    drop_other_towers,
    dtype_of,
    name_of,
    vocabulary_cuts,
    without_weights,
    wrapper_without_weights,
)
from engine.weights.quantised_checkpoint import is_left_to_transformers, open_checkpoint
from engine.weights.weight_files import find_published, find_weight_files
from engine.weights.weight_loader import Bar, check_fit, load_cut
from engine.weights.weight_reader import Checkpoint, MisfitError


def read_target(
    config: PreTrainedConfig, section: TargetSection, device: torch.device, mesh: TargetMesh, bar: Bar | None
) -> tuple[PreTrainedModel, TargetPlan]:
    """Build a target on the meta device and read its weights straight to `device`.

    If ranks share the target, only this rank's part of the weights is read. Quantisations that only
    Transformers supports are read by Transformers.
    Raises MisfitError, before any weight is read, if the checkpoint does not fit the config.
    """
    if is_left_to_transformers(config):
        return _read_by_transformers(config, section, device), TargetPlan()
    checkpoint = _open(config, section)
    model, dropped = _text_without_weights(config, section, device)
    plan = TargetPlan()
    cuts: dict[str, ShardSpec] = {}
    if mesh.size > 1:
        decoder = decoder_of(model)
        plan = TargetPlan.of(decoder, mesh)
        prefix = name_of(decoder, model)
        cuts = {f"{prefix}.{name}": cut for name, cut in plan.cuts.items()}
        cuts |= vocabulary_cuts(model, mesh.tp)
    wrapper = wrapper_without_weights(config, section)
    load_cut(model, cuts, checkpoint, device, bar, wrapper, dropped)
    _read_generation_config(model, section)
    return model, plan


def refuse_misfits(section: TargetSection) -> None:
    """Raise MisfitError, listing all misfits, if a checkpoint does not fit its config.

    No weight is read.
    """
    config = load_target_config(section)
    if is_left_to_transformers(config):
        return
    checkpoint = _open(config, section)
    model, dropped = _text_without_weights(config, section, torch.device("cpu"))
    check_fit(model, checkpoint, wrapper_without_weights(config, section), dropped)


def _open(config: PreTrainedConfig, section: TargetSection) -> Checkpoint:
    """Open the checkpoint that a config describes; removes quantisation settings from `config`."""
    return open_checkpoint(config, section.path, section.revision, section.keep_quantised, section.fp8_activations)


def _text_without_weights(
    config: PreTrainedConfig, section: TargetSection, device: torch.device
) -> tuple[PreTrainedModel, set[str]]:
    """Build the text model on the meta device.

    Returns the model and the names of the weights of other towers, which were dropped.
    """
    model = without_weights(config, section, device)
    built = set(model.state_dict())
    drop_other_towers(model, decoder_of(model))
    return model, built - set(model.state_dict())


def _read_generation_config(model: PreTrainedModel, section: TargetSection) -> None:
    """Load the generation config of a model, which may name more end tokens than its config."""
    if find_published(section.path, GENERATION_CONFIG_NAME, section.revision) is not None:
        found = GenerationConfig.from_pretrained(section.path, revision=section.revision or "main")
        model.generation_config = found


def _read_by_transformers(config: PreTrainedConfig, section: TargetSection, device: torch.device) -> PreTrainedModel:
    """Read a whole model to `device` by Transformers, for quantisations that only it supports.

    Raises MisfitError, listing all weights that are missing, unknown or of another shape.
    """
    find_weight_files(section.path, section.revision).check()
    # A model and its loading info; the annotation of Transformers names only the model.
    loaded: Any = auto_class(config).from_pretrained(
        section.path,
        config=config,
        dtype=dtype_of(section, device),
        device_map=device,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **section.hub_arguments,
    )
    model, seen = loaded
    problems = [f"{name}: missing" for name in sorted(seen["missing_keys"])]
    problems += [f"{name}: no such weight" for name in sorted(seen["unexpected_keys"])]
    for name, shape, expected in sorted(seen["mismatched_keys"]):
        problems.append(f"{name}: has shape {list(shape)}, the config says {list(expected)}")
    if problems:
        raise MisfitError(section.path, problems)
    return model
