"""Access to the parts of a Transformers causal LM, and construction of one without weights."""

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

# The logit, before any scale, of a row that is not a token. It has no weight in a softmax and does
# not overflow in any precision.
NEVER = -3e4

AutoClass = type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]


def auto_class(config: PreTrainedConfig) -> AutoClass:
    """Return the class that builds a config's text model, or the wrapper's if there is none."""
    is_wrapper = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM


def dtype_of(section: TargetSection, device: torch.device) -> torch.dtype:
    """Return the precision in which a target runs on a device."""
    chosen = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, chosen if section.dtype == "auto" else section.dtype)


def without_weights(config: PreTrainedConfig, section: TargetSection, device: torch.device) -> PreTrainedModel:
    """Build the model that is to run on `device`, with its weights on the meta device."""
    auto = auto_class(config)
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype_of(section, device), **_code_options(config, section, auto))


def _code_options(config: PreTrainedConfig, section: TargetSection, auto: AutoClass) -> dict[str, object]:
    """Return the options of `auto` for code shipped with the checkpoint: permission and revision.

    Classes of Transformers take no code revision, and `target.revision` does not apply to code of
    another repository.
    """
    options: dict[str, object] = {"trust_remote_code": section.trust_remote_code}
    reference = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    is_own_code = reference is not None and "--" not in reference
    if section.revision is not None and section.trust_remote_code and is_own_code:
        options["code_revision"] = section.revision
    return options


def wrapper_without_weights(config: PreTrainedConfig, section: TargetSection) -> PreTrainedModel | None:
    """Build a multimodal model with all its towers on the meta device; None for other configs."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    with torch.device("meta"):
        options = _code_options(config, section, AutoModelForImageTextToText)
        return AutoModelForImageTextToText.from_config(config, **options)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that maps token ids to the state after the final norm.

    `get_decoder` of Llama 4's text class does not find it.
    """
    decoder = model.get_decoder()
    if decoder is not model:
        return decoder
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def layers_of(decoder: PreTrainedModel) -> nn.ModuleList:
    count = num_layers(decoder.config)
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ValueError(f"target family {decoder.config.model_type!r} has no list of {count} decoder layers; use another target")


def head_of(model: PreTrainedModel, tp: Group = ALONE.tp) -> TargetHead:
    """Return the LM head of a model. tp: the ranks that share its rows.

    Raises ValueError if the head is not one linear map.
    """
    final = final_logits(model.config)
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        family = model.config.model_type
        raise ValueError(f"target family {family!r} has a {type(linear).__name__} as its head; expected one linear map")
    bias_V = None if linear.bias is None else linear.bias.detach()
    if final.num_tokens is not None and final.num_tokens < linear.out_features:
        first, stop = part_of_rows(linear.out_features, tp)
        bias_V = torch.zeros_like(linear.weight[:, 0]) if bias_V is None else bias_V.clone()
        bias_V[max(0, final.num_tokens - first) : stop - first] = NEVER
    return TargetHead(linear.weight.detach(), final.scale, final.soft_cap, bias_V=bias_V)


def name_of(part: nn.Module, model: nn.Module) -> str:
    """Return the name of a module within a model."""
    return next(name for name, module in model.named_modules() if module is part)


def vocabulary_cuts(model: PreTrainedModel, tp: Group) -> dict[str, ShardSpec]:
    """Return the part of the head that a rank holds, by parameter name; empty if it is whole."""
    linear = model.get_output_embeddings()
    if tp.size == 1 or not isinstance(linear, nn.Linear):
        return {}
    rows = ShardSpec(0, (part_of_rows(linear.out_features, tp),))
    return {f"{name_of(linear, model)}.{leaf}": rows for leaf, _ in linear.named_parameters()}


def cut_head(model: PreTrainedModel, tp: Group, is_tied: bool) -> None:
    """Keep only a rank's part of the head; a tied head takes the already sharded embedding."""
    linear = model.get_output_embeddings()
    for name, cut in vocabulary_cuts(model, tp).items():
        leaf = name.rpartition(".")[2]
        own = nn.Parameter(cut.of(getattr(linear, leaf)).clone(), requires_grad=False)
        setattr(linear, leaf, model.get_input_embeddings().weight if is_tied and leaf == "weight" else own)


def drop_other_towers(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Free the vision and audio towers of a multimodal wrapper, which text does not need."""
    needed = {decoder, model.get_output_embeddings()}
    for owner in (model, model.base_model):
        for name, child in list(owner.named_children()):
            if owner is not decoder and needed.isdisjoint(child.modules()):
                setattr(owner, name, None)
