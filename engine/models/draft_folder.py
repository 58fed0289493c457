"""The folder of an exported draft, `model.safetensors` and `config.json`, and the file of its vocabulary.

Published drafts with an index and several files of weights can be read too.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.config.strict import parse_json, read_text
from engine.host.files import write_json, write_tensors, write_whole, writing
from engine.host.weight_index import FETCH_AGAIN, INDEX, SINGLE, read_index
from engine.models.vocab_map import VocabMap

WEIGHTS = SINGLE
CARD = "README.md"  # the model card, which need not exist
CONFIG = "config.json"
VOCAB = "vocab_map.safetensors"


def check_replaceable(folder: Path) -> None:
    """Raise ValueError if `folder`, which export would replace, holds anything but an export."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {WEIGHTS, CONFIG, CARD}):
        raise ValueError(f"{folder} exists and is no exported draft; it would be replaced, so name another folder")


def write_draft_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write weights and config.json, replacing any earlier export in `folder`.

    The new folder replaces the old one as a whole; if anything fails, the old one stays. Equal
    drafts give equal bytes.
    Raises ValueError if `folder` holds anything but an exported draft.
    """

    def write(place: Path) -> None:
        write_tensors(place / WEIGHTS, dict(sorted(tensors.items())), {"format": "pt"})
        write_json(place / CONFIG, config, sort_keys=True)

    _replace(folder, write)


def copy_draft_folder(source: Path, folder: Path) -> None:
    """Copy an exported draft, replacing any earlier export in `folder`, with the errors of `write_draft_folder`."""

    def write(place: Path) -> None:
        for name in (WEIGHTS, CONFIG):
            write_whole(place / name, partial(shutil.copyfile, source / name))

    _replace(folder, write)


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Replace an export as a whole. write: writes the files of the new one to a folder."""
    check_replaceable(folder)
    new, previous = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "previous"))
    with writing(folder):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            write(new)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            os.replace(folder, previous)
        os.replace(new, folder)
        shutil.rmtree(previous, ignore_errors=True)


def read_draft_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of an exported draft. Raises ValueError if `folder` holds none."""
    for name, exists in ((WEIGHTS, has_safetensors(folder)), (CONFIG, (folder / CONFIG).is_file())):
        if not exists:
            advice = "a run writes one to its output_dir/draft, and launcher/export_draft.py exports a checkpoint"
            raise ValueError(f"{folder} is not an exported draft: it has no {name}; {advice}")
    exported = parse_json(read_text(folder / CONFIG), folder / CONFIG)
    if not isinstance(exported, dict):
        raise ValueError(f"{folder / CONFIG}: expected the object of a draft's config.json")
    return exported


def has_safetensors(folder: Path) -> bool:
    """Return whether a folder has weights in safetensors files, one or several with an index."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def read_draft_weights(folder: Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Return the tensors of an exported or published draft on a device. Raises ValueError if a file is missing or damaged."""
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_paths(folder):
        with _opened(path, device) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def draft_tensor_names(folder: Path) -> set[str]:
    """Return the names of the tensors of a draft, with the errors of `read_draft_weights`."""
    names: set[str] = set()
    for path in _weight_paths(folder):
        with _opened(path, "cpu") as file:
            names |= set(file.keys())
    return names


def _weight_paths(folder: Path) -> list[Path]:
    """Return the files of a draft's weights: one, or else those that the index names."""
    if not (folder / INDEX).is_file() or (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(read_index(folder / INDEX).values()))]


def _opened(path: Path, device: torch.device | str) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing, which holds weights of the draft; fetch it, for example with `hf download`")
    try:
        return safe_open(path, "pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); {FETCH_AGAIN}") from error


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


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError, naming the tensor, if a value is NaN or infinite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite; lower the learning rate and train again")


def check_names(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless `tensors` has the names and shapes of `expected`."""
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"the draft's tensors do not match its config: missing {missing}, unknown {unknown}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, its config asks for {list(expected[name].shape)}")
