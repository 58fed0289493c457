"""DFlash as a draft method. Source: DFlash (arXiv:2602.06036)."""

from typing import ClassVar

from torch import Tensor

from engine.kernels import FrozenHead
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.block_drafter.served_block import ServedBlock, ServedIndependent
from engine.models.dflash.dflash_draft import DFlashConfig, DFlashDraft


class DFlash(BlockMethod[DFlashConfig, DFlashDraft]):
    """A block whose first row reads the newest token and whose other rows each draft one token."""

    title = "DFlash"
    unread: ClassVar[tuple[str, ...]] = (
        *BlockMethod.unread,
        "block.markov_head",
        "block.markov_rank",
        "block.confidence_head",
        "block.conv_taps",
        "block.conv_group",
        "block.selector_rank",
        "block.selector_top_k",
        "objective.confidence",
        "objective.selector",
        "objective.selector_inject",
        "objective.selector_normaliser",
        "evaluation.min_confidence",
    )
    config_type = DFlashConfig
    draft_type = DFlashDraft
    default_size = 16

    @property
    def num_predictions(self) -> int:
        return self.block_size - 1

    def served(self, model: DFlashDraft, embed_weight_VD: Tensor, head: FrozenHead) -> ServedBlock:
        return ServedIndependent(model, embed_weight_VD, head)
