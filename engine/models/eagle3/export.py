"""Export of a draft to the folder that a server loads, and loading of such a folder.

The folder holds `model.safetensors` and `config.json` of SGLang's `LlamaForCausalLMEagle3`, and the
further names that vLLM reads. A server silently ignores misnamed tensors and keeps random weights.
Names, shapes and the vocabulary tables are therefore checked here, before anything is written.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from engine.kernels import PLAIN, Kernels
from engine.models.draft_folder import (
    CONFIG,
    check_finite,
    check_names,
    check_replaceable,
    read_draft_config,
    read_draft_weights,
    write_draft_folder,
)
from engine.models.draft_layers import RotaryTable
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import Eagle3Config
from engine.models.eagle3.served_draft import ServedEagle3
from engine.models.vocab_map import VocabMap

PROJECTION = "embed_projection.weight"
EMBEDDING = "embed_tokens.weight"
DEEPER_NORM = re.compile(r"(layers\.[1-9]\d*\.)hidden_norm\.weight")


def export_draft(
    folder: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    config: Eagle3Config,
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
        check_names(tensors, dict(Eagle3Draft(config).state_dict()))
    projection_DD = tensors.pop(PROJECTION, None)
    if projection_DD is not None:
        assert embed_weight_VD is not None, "a draft with a projection ships the target's embedding"
        check_embedding(embed_weight_VD, config.vocab_size, config.target_hidden_size)
        tensors[EMBEDDING] = (embed_weight_VD.cpu().float() @ projection_DD.float().T).to(dtype).contiguous()
    check_finite(tensors)
    tensors |= _norm_copies(tensors)
    write_draft_folder(folder, tensors | vocabulary_tables(vocab_map, config), config.to_dict())


def load_draft(
    folder: Path,
    embed_weight_VD: torch.Tensor | None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    kernels: Kernels = PLAIN,
) -> ServedEagle3:
    """Load an exported folder as a server does.

    embed_weight_VD: the target's embedding, used if the folder contains none.
    dtype: None = the checkpoint's dtype.
    Raises ValueError if a file or tensor is missing, unknown or misshapen.
    """
    config = Eagle3Config.from_dict(read_draft_config(folder), folder / CONFIG)
    tensors = read_draft_weights(folder, device)
    vocab_map = _take_vocabulary(tensors, config)
    embed_weight_VD = tensors.pop(EMBEDDING, embed_weight_VD)
    if embed_weight_VD is None:
        raise ValueError(f"{folder} ships no embedding: it shares its target's, so name the target")
    check_embedding(embed_weight_VD, config.vocab_size, config.hidden_size)
    with torch.device("meta"):
        model = Eagle3Draft(config, kernels)
    model.embed_projection = None
    model.rotary = RotaryTable(config)
    tensors = without_norm_copies(tensors, folder)
    check_names(tensors, dict(model.state_dict()))
    model.load_state_dict(tensors, assign=True)
    dtype = dtype or getattr(torch, config.dtype)
    return ServedEagle3(
        model.to(device, dtype).eval().requires_grad_(False),
        vocab_map.to(torch.device(device)),
        embed_weight_VD.to(device, dtype),
    )


def _norm_copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of the norms of deeper layers under the name by which vLLM reads them.

    In layers that do not read the embedding, SGLang normalises the input with `hidden_norm`, and vLLM
    with `input_layernorm`, which it leaves at ones if there is none.
    """
    matches = ((DEEPER_NORM.fullmatch(name), weight_D) for name, weight_D in tensors.items())
    return {f"{match[1]}input_layernorm.weight": weight_D.clone() for match, weight_D in matches if match is not None}


def without_norm_copies(tensors: dict[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    """Return tensors without the copies that an export adds. Raises ValueError if a copy differs from its norm."""
    copies = _norm_copies(tensors)
    for name, copy_D in copies.items():
        found_D = tensors.get(name)
        if found_D is not None and not torch.equal(found_D, copy_D):
            raise ValueError(
                f"{source}: {name} differs from the hidden_norm of its layer; vLLM would use the former and SGLang the latter, "
                "so export the draft again"
            )
    return {name: tensor for name, tensor in tensors.items() if name not in copies}


def check_embedding(weight_VD: torch.Tensor, vocab_size: int, width: int) -> None:
    """Raise ValueError unless an embedding has the shape that the draft's config asks for."""
    if weight_VD.shape != (vocab_size, width):
        problem = f"the embedding has shape {list(weight_VD.shape)}, the draft's config asks for {[vocab_size, width]}"
        raise ValueError(f"{problem}; name the target that the draft was trained for")


def vocabulary_tables(vocab_map: VocabMap, config: Eagle3Config) -> dict[str, torch.Tensor]:
    """Return the tensors that say which tokens the draft can propose; none if it can propose all.

    vLLM refuses tables of a draft with the whole vocabulary. SGLang, without them, takes a draft's ids as those of the target.
    Raises ValueError unless they have the config's sizes.
    """
    tables = {"d2t": vocab_map.d2t.cpu().contiguous(), "t2d": vocab_map.in_draft_V.cpu().contiguous()}
    _check_vocabulary(tables, config)
    return tables if config.draft_vocab_size < config.vocab_size else {}


def _take_vocabulary(tensors: dict[str, torch.Tensor], config: Eagle3Config) -> VocabMap:
    """Remove the tables of the vocabulary from a draft's tensors and return what they say."""
    if config.draft_vocab_size == config.vocab_size and not {"d2t", "t2d"} & tensors.keys():
        return VocabMap.whole(config.vocab_size)
    _check_vocabulary(tensors, config)
    return VocabMap.from_tables(tensors.pop("d2t"), tensors.pop("t2d"))


def _check_vocabulary(tensors: dict[str, torch.Tensor], config: Eagle3Config) -> None:
    """Raise ValueError unless `d2t` and `t2d` are there, have the config's sizes and fit each other."""
    for name, size in (("d2t", config.draft_vocab_size), ("t2d", config.vocab_size)):
        if name not in tensors or tensors[name].numel() != size:
            raise ValueError(f"{name} must have {size} entries, as the config's vocabulary has")
    VocabMap.from_tables(tensors["d2t"], tensors["t2d"])
