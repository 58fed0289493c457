"""Export of a draft to the folder that a server loads, and loading of such a folder.

The folder holds `model.safetensors` and `config.json` of SGLang's `LlamaForCausalLMEagle3`. A
server silently ignores misnamed tensors and keeps random weights. Names, shapes and the vocabulary
tables are therefore checked here, before anything is written.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.config.strict import parse_json, read_text
from engine.host.files import write_json, write_tensors, writing
from engine.kernels import PLAIN, Kernels
from engine.models.eagle3.draft import Eagle3Draft, RotaryTable, ServedDraft
from engine.models.eagle3.draft_config import DraftConfig
from engine.models.vocab_map import VocabMap

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
VOCAB = "vocab_map.safetensors"
PROJECTION = "embed_projection.weight"
EMBEDDING = "embed_tokens.weight"


def export_draft(
    folder: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    config: DraftConfig,
    vocab_map: VocabMap,
    embed_weight_VD: torch.Tensor | None,
) -> None:
    """Write the draft in the format that a server loads, replacing any earlier export in `folder`.

    The new folder replaces the old one as a whole; if anything fails, the old one stays. Equal
    drafts give equal bytes.

    weights: names and tensors of the draft.
    embed_weight_VD: the target's embedding. It is exported, projected to the draft's width, only if
        the two widths differ.
    Raises ValueError if a tensor is missing, unknown, misshapen or not finite, or if `folder` holds
    anything but an exported draft.
    """
    check_replaceable(folder)
    dtype = getattr(torch, config.dtype)
    tensors = {name: weight.to("cpu", dtype).contiguous() for name, weight in weights}
    with torch.device("meta"):
        _check_names(tensors, dict(Eagle3Draft(config).state_dict()))
    projection_DD = tensors.pop(PROJECTION, None)
    if projection_DD is not None:
        assert embed_weight_VD is not None, "a draft with a projection ships the target's embedding"
        _check_embedding(embed_weight_VD, config.vocab_size, config.target_hidden_size)
        tensors[EMBEDDING] = (embed_weight_VD.cpu().float() @ projection_DD.float().T).to(dtype).contiguous()
    _check_finite(tensors)
    tensors |= {"d2t": vocab_map.d2t.cpu().contiguous(), "t2d": vocab_map.in_draft_V.cpu().contiguous()}
    _check_vocabulary(tensors, config)
    _replace_folder(folder, tensors, config)


def check_replaceable(folder: Path) -> None:
    """Raise ValueError if `folder`, which export would replace, holds anything but an export."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {WEIGHTS, CONFIG}):
        raise ValueError(f"{folder} exists and is no exported draft; it would be replaced, so name another folder")


def _replace_folder(folder: Path, tensors: dict[str, torch.Tensor], config: DraftConfig) -> None:
    partial, previous = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "previous"))
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write_tensors(partial / WEIGHTS, dict(sorted(tensors.items())), {"format": "pt"})
            write_json(partial / CONFIG, config.to_dict(), sort_keys=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            os.replace(folder, previous)
        os.replace(partial, folder)
        shutil.rmtree(previous, ignore_errors=True)


def load_draft(
    folder: Path,
    embed_weight_VD: torch.Tensor | None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    kernels: Kernels = PLAIN,
) -> ServedDraft:
    """Load an exported folder as a server does.

    embed_weight_VD: the target's embedding, used if the folder contains none.
    dtype: None = the checkpoint's dtype.
    Raises ValueError if a file or tensor is missing, unknown or misshapen.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not an exported draft: it has no {name}; export one with launcher/export_draft.py")
    config = DraftConfig.from_dict(parse_json(read_text(folder / CONFIG), folder / CONFIG), folder / CONFIG)
    with safe_open(folder / WEIGHTS, "pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    _check_vocabulary(tensors, config)
    vocab_map = VocabMap.from_tables(tensors.pop("d2t"), tensors.pop("t2d"))
    embed_weight_VD = tensors.pop(EMBEDDING, embed_weight_VD)
    if embed_weight_VD is None:
        raise ValueError(f"{folder} ships no embedding: it shares its target's, so name the target")
    _check_embedding(embed_weight_VD, config.vocab_size, config.hidden_size)
    with torch.device("meta"):
        model = Eagle3Draft(config, kernels)
    model.embed_projection = None
    model.rotary = RotaryTable(config)
    _check_names(tensors, dict(model.state_dict()))
    model.load_state_dict(tensors, assign=True)
    dtype = dtype or getattr(torch, config.dtype)
    return ServedDraft(
        model.to(device, dtype).eval().requires_grad_(False),
        vocab_map.to(torch.device(device)),
        embed_weight_VD.to(device, dtype),
    )


def save_vocab_map(vocab_map: VocabMap, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a draft vocabulary to a file.

    facts: JSON values that describe the data it was counted on. With `tokenizer_hash`, other runs
        can check whether the vocabulary fits their tokenizer.
    """
    tables = {"d2t": vocab_map.d2t.contiguous(), "t2d": vocab_map.in_draft_V.contiguous()}
    write_tensors(path, tables, {"facts": json.dumps(dict(facts or {}))})


def load_vocab_facts(path: Path) -> dict[str, Any]:
    """Return the facts that `save_vocab_map` stored."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("facts", "{}"))


def load_vocab_map(path: Path, tokenizer_hash: str | None = None) -> VocabMap:
    """Load a draft vocabulary.

    tokenizer_hash: hash of the tokenizer that it must fit; None = not checked.
    Raises ValueError if the file is not a draft vocabulary or belongs to another tokenizer.
    """
    try:
        facts = load_vocab_facts(path)
        with safe_open(path, "pt") as file:
            vocab_map = VocabMap.from_tables(file.get_tensor("d2t"), file.get_tensor("t2d"))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a draft vocabulary ({error}); a run writes one as {VOCAB}") from error
    if tokenizer_hash is not None and facts.get("tokenizer_hash") != tokenizer_hash:
        made_for = facts.get("tokenizer_hash", "none that it names")
        problem = f"{path} was counted with another tokenizer ({made_for}, this one is {tokenizer_hash})"
        raise ValueError(f"{problem}: its ids mean other tokens; leave draft.vocab_map out to count again")
    return vocab_map


def _check_finite(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite; lower the learning rate and train again")


def _check_names(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"the draft's tensors do not match its config: missing {missing}, unknown {unknown}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, its config asks for {list(expected[name].shape)}")


def _check_embedding(weight_VD: torch.Tensor, vocab_size: int, width: int) -> None:
    if weight_VD.shape != (vocab_size, width):
        problem = f"the embedding has shape {list(weight_VD.shape)}, the draft's config asks for {[vocab_size, width]}"
        raise ValueError(f"{problem}; name the target that the draft was trained for")


def _check_vocabulary(tensors: dict[str, torch.Tensor], config: DraftConfig) -> None:
    for name, size in (("d2t", config.draft_vocab_size), ("t2d", config.vocab_size)):
        if name not in tensors or tensors[name].numel() != size:
            raise ValueError(f"{name} must have {size} entries, as the config's vocabulary has")
    VocabMap.from_tables(tensors["d2t"], tensors["t2d"])
