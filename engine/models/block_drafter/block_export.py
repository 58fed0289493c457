"""Export of a block drafter to the folder that SGLang and vLLM load, and loading of such a folder.

SGLang drops tensors that it does not know and does not notice missing ones, so names and shapes are
checked here. The embedding and the head are the target's and are not written.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_config import BlockConfig
from engine.models.draft_folder import check_finite, check_names, check_replaceable, read_draft_weights, write_draft_folder
from engine.models.target_families import check_aux_layers

# Copies of the target's tensors in drafts that other trainers publish, and a prefix that servers accept.
OF_TARGET = ("embed_tokens.weight", "lm_head.weight")
PREFIX = "model."
MASK_EMBEDDING = "mask_embedding.pt"  # of published drafts whose mask rows read an embedding of their own


def export_block_draft(folder: Path, weights: Iterable[tuple[str, Tensor]], draft: BlockDraft) -> None:
    """Write the draft in the format that servers load, replacing any earlier export in `folder`.

    The new folder replaces the old one as a whole; if anything fails, the old one stays.
    weights: names and tensors of the draft. draft: a draft of the same config, on the meta device.
    Raises ValueError if a tensor is missing, unknown, misshapen or not finite, or if servers would read the config otherwise.
    """
    check_replaceable(folder)
    config: BlockConfig = draft.config
    check_served(config)
    dtype = getattr(torch, config.dtype)
    tensors = {name: weight.to("cpu", dtype).contiguous() for name, weight in weights}
    check_names(tensors, dict(draft.state_dict()))
    check_finite(tensors)
    write_draft_folder(folder, tensors, config.to_dict())


def check_served(config: BlockConfig) -> None:
    """Raise ValueError for a config that servers cannot represent, or would read otherwise."""
    check_aux_layers(config.aux_layers, config.num_target_layers)
    windows = {window for window in config.windows if window is not None}
    if len(windows) > 1:
        problem = f"block.windows has several sizes, {sorted(windows)}, and a config.json has one"
        raise ValueError(f"{problem}; use the same in all layers that have a window")


def read_block_weights(folder: Path, draft: BlockDraft, device: torch.device | str) -> dict[str, Tensor]:
    """Return the tensors of an exported or published draft.

    draft: a draft of its config, whose tensors they must fit.
    Raises ValueError if a tensor is missing, unknown or misshapen, or the mask token has another embedding.
    """
    if (folder / MASK_EMBEDDING).exists():
        problem = (
            f"{folder / MASK_EMBEDDING} replaces the target's embedding of the mask token, which drafts here do not support"
        )
        raise ValueError(f"{problem}; use a draft without this file")
    found = read_draft_weights(folder, device)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in OF_TARGET}
    check_names(tensors, dict(draft.state_dict()))
    return tensors
