"""Export of a draft in the format of vLLM's `speculators` library, which that library trains on and vLLM serves."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from engine.models.draft_folder import check_finite, check_names, check_replaceable, write_draft_folder
from engine.models.draft_method import TargetFacts
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import AUX_IDS, Eagle3Config
from engine.models.eagle3.export import DEEPER_NORM, EMBEDDING, check_embedding, vocabulary_tables
from engine.models.vocab_map import VocabMap

SPECULATORS_VERSION = "0.9.0"  # of the library that the format was compared with
ARCHITECTURE = "Eagle3DraftModel"
FIRST_LAYER = "midlayer."  # of a draft with one layer


def export_speculators(
    folder: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    config: Eagle3Config,
    vocab_map: VocabMap,
    embed_weight_VD: torch.Tensor,
    target: TargetFacts,
) -> None:
    """Write the draft in the format of `speculators`, replacing any earlier export in `folder`.

    weights: names and tensors of the draft. embed_weight_VD: the target's embedding, which the format includes.
    Raises ValueError if a tensor is missing, unknown, misshapen or not finite, if the draft's width
    is not the target's, which the format cannot express, or if `folder` holds anything but an export.
    """
    check_replaceable(folder)
    if config.hidden_size != config.target_hidden_size:
        raise ValueError(
            f"draft.hidden_size={config.hidden_size} differs from the target's {config.target_hidden_size}: the format of "
            "speculators has drafts as wide as their target only; export with --format sglang"
        )
    dtype = getattr(torch, config.dtype)
    tensors = {name: weight.to("cpu", dtype).contiguous() for name, weight in weights}
    with torch.device("meta"):
        check_names(tensors, dict(Eagle3Draft(config).state_dict()))
    check_embedding(embed_weight_VD, config.vocab_size, config.hidden_size)
    tensors[EMBEDDING] = embed_weight_VD.to("cpu", dtype).contiguous()
    check_finite(tensors)
    exported = {_exported_name(name): tensor for name, tensor in tensors.items()} | vocabulary_tables(vocab_map, config)
    write_draft_folder(folder, exported, speculators_config(config, target))


def speculators_config(config: Eagle3Config, target: TargetFacts) -> dict[str, Any]:
    """Return the config.json of the format.

    Auxiliary layers are numbered by the states that they read: layer `i` reads what layer `i - 1` returns.
    """
    assert config.aux_layers is not None, "the config of a draft that was trained names its layers"
    layer_config = {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_hidden_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "vocab_size": config.vocab_size,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        layer_config[name] = list(value) if isinstance(value, tuple) else value
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": target.num_steps,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    exported = {
        "architectures": [ARCHITECTURE],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target.name, "architectures": list(target.architectures)},
        },
        "transformer_layer_config": layer_config,
        "draft_vocab_size": config.draft_vocab_size,
        # The library's default is false, and that of vLLM is true.
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "embed_requires_grad": False,
        AUX_IDS: [layer + 1 for layer in config.aux_layers],
        "tie_word_embeddings": False,
        "dtype": config.dtype,
    }
    if config.trained_with:
        exported["draftspeed"] = config.trained_with
    return exported


def _exported_name(name: str) -> str:
    """Return the name in the format of a tensor of the draft.

    Layers that do not read the embedding are the library's plain Llama layers, whose first norm is `input_layernorm`.
    """
    deeper = DEEPER_NORM.fullmatch(name)
    if deeper is not None:
        return f"{deeper[1]}input_layernorm.weight"
    if name.startswith(FIRST_LAYER):
        return "layers.0." + name.removeprefix(FIRST_LAYER)
    return name
