"""Start a draft from the weights of another EAGLE-3 draft, whichever program trained it."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from engine.config.strict import parse_json, read_text
from engine.host.weight_index import PICKLED
from engine.models.draft_folder import CONFIG, WEIGHTS, has_safetensors, read_draft_weights
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import MUST_BE_FALSE, check_architecture, exported_aux_layers
from engine.models.eagle3.export import without_norm_copies
from engine.models.vocab_map import VocabMap

# Facts that two drafts must share although their weights have the same shapes.
SAME = ("head_dim", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "hidden_act", "norm_output")
PREFIXES = ("module.", "model.", "draft_model.")  # that other programs put before names
HEAD = "lm_head.weight"
NOT_LEARNED = ("embed_tokens.weight", "d2t", "t2d")


def start_from_draft(draft: Eagle3Draft, folder: Path, vocab_map: VocabMap) -> str:
    """Copy the weights of an exported draft into `draft`, and return a line for the log.

    Rows of the LM head are copied by the target's token: tokens that the other draft does not have
    keep their initial rows.
    folder: holds model.safetensors, or the files that model.safetensors.index.json names, or
        pytorch_model.bin; config.json is read if there is one.
    Raises ValueError if weights are missing or damaged, or if the other draft has other shapes, layers
    or auxiliary layers.
    """
    if draft.embed_projection is not None:
        problem = (
            "needs a draft as wide as its target: a narrower one reads embeddings that another draft has projected its own way"
        )
        raise ValueError(f"draft.init_from = {folder} {problem}")
    weights = {_own_name(name, draft): tensor for name, tensor in _read(folder).items()}
    weights = without_norm_copies(weights, folder)
    _check_config(folder, draft)
    own = dict(draft.named_parameters())
    known_U, head_VD = _head_by_token(weights, own[HEAD], vocab_map, folder)
    expected = {name: tuple(parameter.shape) for name, parameter in own.items() if name != HEAD}
    found = {name: tuple(weight.shape) for name, weight in weights.items() if name not in (HEAD, *NOT_LEARNED)}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            problems.append(f"{name} has shape {list(found[name])}, expected {list(expected[name])}")
    if problems:
        advice = "give this draft the shapes of that one (draft.num_layers, draft.intermediate_size, draft.fc_norm, ...)"
        raise ValueError(f"draft.init_from = {folder} does not fit: {'; '.join(problems[:4])}; {advice}")
    with torch.no_grad():
        for name, parameter in own.items():
            if name != HEAD:
                parameter.copy_(weights[name])
        own[HEAD][known_U] = head_VD[vocab_map.target_ids_U.cpu()[known_U.cpu()]].to(own[HEAD])
    return f"started from {folder}; {int(known_U.sum()):,} of {vocab_map.size:,} tokens of the LM head were known"


def _own_name(name: str, draft: Eagle3Draft) -> str:
    """Return the name that this project gives to a weight of another program."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if draft.config.num_hidden_layers == 1 and name.startswith("layers.0."):
        return "midlayer." + name.removeprefix("layers.0.")
    return name


def _read(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a draft, on the host. Raises ValueError if there are none."""
    if has_safetensors(folder):
        try:
            return read_draft_weights(folder, "cpu")
        except ValueError as error:
            raise ValueError(f"draft.init_from: {error}") from error
    if (folder / PICKLED).is_file():
        try:
            return torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"draft.init_from: {folder / PICKLED} is damaged or holds more than tensors ({reason})") from error
    raise ValueError(f"draft.init_from = {folder} holds neither {WEIGHTS} nor {PICKLED}; name the folder of an exported draft")


def _check_config(folder: Path, draft: Eagle3Draft) -> None:
    """Raise ValueError if the other draft computes something else with weights of the same shapes.

    A folder without a config is taken to fit.
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    config = parse_json(read_text(path), path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected the object of a draft's config.json")
    check_architecture(config, path)
    for key in MUST_BE_FALSE:
        if config.get(key):
            raise ValueError(f"{path} has {key}=true, which an EAGLE-3 draft here cannot represent")
    for key in SAME:
        found = config.get(key)
        own_value = getattr(draft.config, key)
        if found is not None and found != own_value:
            problem = f"draft.init_from = {folder} has {key}={found!r}, and this draft has {own_value!r}"
            raise ValueError(f"{problem}; give both the same value, with draft.{key} or a draft.config")
    layers = exported_aux_layers(config, path)
    own = draft.config.aux_layers
    if layers is not None and own is not None and tuple(layers) != tuple(own):
        problem = f"draft.init_from = {folder} reads the target's layers {list(layers)}, and this run gives it {list(own)}"
        raise ValueError(f"{problem}; set target.aux_layers={list(layers)}")


def _head_by_token(weights: dict[str, Tensor], own_UD: Tensor, vocab_map: VocabMap, folder: Path) -> tuple[Tensor, Tensor]:
    """Return which tokens of this draft the other one knows, bool [U], and its head by target token, [V, D].

    Raises ValueError if it has no head, or one of another width or for another target.
    """
    head = weights.get(HEAD)
    if head is None or head.shape[1] != own_UD.shape[1]:
        found = "no lm_head" if head is None else f"an lm_head of width {head.shape[1]}"
        raise ValueError(f"draft.init_from = {folder} has {found}, expected width {own_UD.shape[1]}")
    num_tokens = vocab_map.in_draft_V.numel()
    offsets = weights.get("d2t")
    if offsets is None:
        if head.shape[0] != num_tokens:
            raise ValueError(
                f"draft.init_from = {folder} has {head.shape[0]} rows in its lm_head and no d2t that names their tokens"
            )
        token_ids = torch.arange(num_tokens)
    else:
        token_ids = offsets.cpu() + torch.arange(offsets.numel())
    if token_ids.numel() != head.shape[0] or int(token_ids.max()) >= num_tokens:
        raise ValueError(f"draft.init_from = {folder} is a draft for a target with another vocabulary than {num_tokens} tokens")
    head_VD = torch.zeros(num_tokens, head.shape[1], dtype=head.dtype)
    head_VD[token_ids] = head
    is_known_V = torch.zeros(num_tokens, dtype=torch.bool)
    is_known_V[token_ids] = True
    return is_known_V[vocab_map.target_ids_U.cpu()].to(own_UD.device), head_VD
