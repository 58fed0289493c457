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
from engine.models.draft_method import TargetTables
from engine.models.target_families import check_aux_layers

# Copies of the target's tensors in drafts that other trainers publish, and a prefix that servers accept.
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PREFIX = "model."
ROWS_COMPARED = 8192  # at once
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


def read_block_weights(
    folder: Path, draft: BlockDraft, target: TargetTables, every_V: Tensor, device: torch.device | str
) -> dict[str, Tensor]:
    """Return the tensors of an exported or published draft; a collective of the ranks that share the target.

    draft: a draft of its config, whose tensors they must fit.
    target: its embedding and head, which the draft shares. every_V: int64, all token ids, on the target's device.
    device: of the result.
    Raises ValueError if a tensor is missing, unknown or misshapen, if the mask token has another embedding, or if the
    folder's copy of the target's embedding or head differs from it.
    """
    if (folder / MASK_EMBEDDING).exists():
        problem = (
            f"{folder / MASK_EMBEDDING} replaces the target's embedding of the mask token, which drafts here do not support"
        )
        raise ValueError(f"{problem}; use a draft without this file")
    found = read_draft_weights(folder, device)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    embedding_VD = tensors.pop(EMBEDDING, None)
    head_VD = tensors.pop(HEAD, None)
    check_names(tensors, dict(draft.state_dict()))
    if embedding_VD is not None:
        _check_copy(EMBEDDING, embedding_VD, target.embedding.whole(), folder)
    if head_VD is not None:
        _check_copy(HEAD, head_VD, target.head_rows(every_V).weight_VD, folder)
    return tensors


def _check_copy(name: str, copy_VD: Tensor, table_VD: Tensor, folder: Path) -> None:
    """Raise ValueError if a draft's copy of the target's table differs from it, in the narrower of their dtypes."""
    if copy_VD.shape == table_VD.shape:
        pairs = zip(copy_VD.split(ROWS_COMPARED), table_VD.split(ROWS_COMPARED), strict=True)
        if all(torch.equal(copy.to(table), table.to(copy.dtype).to(table.dtype)) for copy, table in pairs):
            return
    raise ValueError(
        f"{folder} has its own {name}, unlike the target's: vLLM would use it, and SGLang the target's; name the target that "
        "the draft was trained for, or use a draft that shares its target's"
    )
