"""Checks of an exported folder for what servers would run differently from the engine, without an error.

Exports of this project pass. Folders of other trainers and of earlier versions may not.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from engine.config.strict import parse_json, read_text
from engine.models.draft_folder import CONFIG, WEIGHTS, draft_tensor_names, has_safetensors
from engine.models.eagle3.draft_config import AUX_IDS, exported_aux_layers
from engine.models.eagle3.export import DEEPER_NORM
from engine.models.target_families import default_aux_layers, num_layers, text_config
from engine.serving.draft_kinds import EAGLE3, SGLANG_NAME, VLLM_NAME, DraftKind

ADVICE = "export the draft again (launcher/export_draft.py), or correct the folder"


def serving_problems(
    folder: Path, kind: DraftKind, target_config: PreTrainedConfig, context_length: int | None = None
) -> dict[str, str]:
    """Return why servers would not serve a draft as the engine measures it, by name of the server.

    The result is empty if both would. Servers that refuse such a draft by themselves are named as well.
    folder: of an exported draft. kind: its kind. target_config: config of the target.
    context_length: tokens to which the server limits conversations; None = the target's positions.
    Names of tensors are checked in safetensors files only. Raises ValueError if a file cannot be read.
    """
    path = folder / CONFIG
    exported = parse_json(read_text(path), path)
    layer_config = exported.get("transformer_layer_config") or exported  # the former in the format of speculators
    target = text_config(target_config)
    limit = layer_config.get("max_position_embeddings")
    num_positions = context_length or getattr(target, "max_position_embeddings", None)
    if limit is not None and num_positions is not None and limit < num_positions:
        problem = (
            f"{CONFIG} has max_position_embeddings={limit}, below the {num_positions} positions of the server: SGLang refuses "
            f"the draft, and vLLM drafts with wrong positions; limit the server to {limit} tokens (--context-length, "
            "--max-model-len)"
        )
        return dict.fromkeys((SGLANG_NAME, VLLM_NAME), problem)
    if kind is not EAGLE3 or layer_config is not exported:
        return {}
    problems = _unread_layers(exported, num_layers(target), folder)
    names = draft_tensor_names(folder) if has_safetensors(folder) else set()
    if "d2t" in names and exported.get("draft_vocab_size") == exported.get("vocab_size"):
        problems.setdefault(VLLM_NAME, f"{WEIGHTS} has d2t, which vLLM refuses of a draft with the whole vocabulary")
    missing = _missing_norm_copies(names)
    if missing:
        problems.setdefault(
            VLLM_NAME, f"{WEIGHTS} has no {missing[0]}, which vLLM then leaves at ones; SGLang reads hidden_norm instead"
        )
    return problems


def _unread_layers(exported: dict[str, Any], num_target_layers: int, folder: Path) -> dict[str, str]:
    """Return the servers that would not find the auxiliary layers of an EAGLE-3 draft and capture others."""
    layers = exported_aux_layers(exported, folder / CONFIG)
    if layers is None:  # all servers then take the default, as the engine does
        return {}
    problems = {}
    is_in_eagle_config = (exported.get("eagle_config") or {}).get(AUX_IDS) is not None
    if not is_in_eagle_config and layers != default_aux_layers(num_target_layers):
        problems[SGLANG_NAME] = (
            f"{CONFIG} has no {AUX_IDS} in eagle_config, without which SGLang captures the outputs of its default layers and "
            f"not those of {list(layers)}"
        )
    if exported.get(AUX_IDS) is None:
        problems[VLLM_NAME] = (
            f"{CONFIG} has no {AUX_IDS} at the top, {[layer + 1 for layer in layers]}, without which vLLM captures other layers"
        )
    return problems


def _missing_norm_copies(names: set[str]) -> list[str]:
    """Return the names of the norms that vLLM reads in deeper layers and that a draft with these tensors lacks."""
    matches = (DEEPER_NORM.fullmatch(name) for name in sorted(names))
    copies = [f"{match[1]}input_layernorm.weight" for match in matches if match is not None]
    return [name for name in copies if name not in names]
