"""Where the parts of a Transformers causal LM lie, and such a model without weights."""

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from engine.config.sections import TargetSection
from engine.models.target_families import final_logits, num_layers
from engine.parallel.mesh import ALONE, Group
from engine.parallel.rules import ShardSpec, part_of_rows
from engine.target.head import TargetHead

NEVER = -3e4  # the logit of a row that is no token, before any scale: no softmax sees it, no precision overflows

AutoClass = type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]


def auto_class(config: PreTrainedConfig) -> AutoClass:
    """What builds the model of a config: its text alone where Transformers has a class for that, else its wrapper."""
    is_wrapper = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM


def dtype_of(section: TargetSection, device: torch.device) -> torch.dtype:
    """The precision that a target runs in on a device."""
    chosen = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, chosen if section.dtype == "auto" else section.dtype)


def without_weights(config: PreTrainedConfig, section: TargetSection, device: torch.device) -> PreTrainedModel:
    """The model that `device` is to run, on the meta device."""
    auto = auto_class(config)
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype_of(section, device), **_code_options(config, section, auto))


def _code_options(config: PreTrainedConfig, section: TargetSection, auto: AutoClass) -> dict[str, object]:
    """Return whether code that the checkpoint ships may run, and the revision of it that `auto` takes.

    Classes of Transformers take no revision, and `target.revision` means nothing for code of another repository.
    """
    options: dict[str, object] = {"trust_remote_code": section.trust_remote_code}
    reference = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    is_own_code = reference is not None and "--" not in reference
    if section.revision is not None and section.trust_remote_code and is_own_code:
        options["code_revision"] = section.revision
    return options


def wrapper_without_weights(config: PreTrainedConfig, section: TargetSection) -> PreTrainedModel | None:
    """Of a multimodal config, the model with all its towers, on the meta device; None where there are none."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    with torch.device("meta"):
        options = _code_options(config, section, AutoModelForImageTextToText)
        return AutoModelForImageTextToText.from_config(config, **options)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The stack from token ids to the state after the final norm; Llama 4's text class hides it from `get_decoder`."""
    decoder = model.get_decoder()
    if decoder is not model:
        return decoder
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def layers_of(decoder: PreTrainedModel) -> nn.ModuleList:
    count = num_layers(decoder.config)
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ValueError(f"target family {decoder.config.model_type!r} keeps no list of {count} decoder layers; use another target")


def head_of(model: PreTrainedModel, tp: Group = ALONE.tp) -> TargetHead:
    """tp: by whom its rows are shared."""
    final = final_logits(model.config)
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        family = model.config.model_type
        raise ValueError(f"target family {family!r} has a {type(linear).__name__} for a head; expected one linear map")
    bias_V = None if linear.bias is None else linear.bias.detach()
    if final.num_tokens is not None and final.num_tokens < linear.out_features:
        first, stop = part_of_rows(linear.out_features, tp)
        bias_V = torch.zeros_like(linear.weight[:, 0]) if bias_V is None else bias_V.clone()
        bias_V[max(0, final.num_tokens - first) : stop - first] = NEVER
    return TargetHead(linear.weight.detach(), final.scale, final.soft_cap, bias_V=bias_V)


def name_of(part: nn.Module, model: nn.Module) -> str:
    """What a model calls a module of its own."""
    return next(name for name, module in model.named_modules() if module is part)


def vocabulary_cuts(model: PreTrainedModel, tp: Group) -> dict[str, ShardSpec]:
    """What a rank holds of the head, by the names of its parameters."""
    linear = model.get_output_embeddings()
    if tp.size == 1 or not isinstance(linear, nn.Linear):
        return {}
    rows = ShardSpec(0, (part_of_rows(linear.out_features, tp),))
    return {f"{name_of(linear, model)}.{leaf}": rows for leaf, _ in linear.named_parameters()}


def cut_head(model: PreTrainedModel, tp: Group, is_tied: bool) -> None:
    """Keep a rank's part of a whole head, which may be the embedding, cut already."""
    linear = model.get_output_embeddings()
    for name, cut in vocabulary_cuts(model, tp).items():
        leaf = name.rpartition(".")[2]
        own = nn.Parameter(cut.of(getattr(linear, leaf)).clone(), requires_grad=False)
        setattr(linear, leaf, model.get_input_embeddings().weight if is_tied and leaf == "weight" else own)


def drop_other_towers(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Free the vision and audio towers of a multimodal wrapper: its text runs without them."""
    needed = {decoder, model.get_output_embeddings()}
    for owner in (model, model.base_model):
        for name, child in list(owner.named_children()):
            if owner is not decoder and needed.isdisjoint(child.modules()):
                setattr(owner, name, None)
