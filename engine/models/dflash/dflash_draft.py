"""The DFlash draft: the backbone alone. Source: DFlash (arXiv:2602.06036)."""

from dataclasses import dataclass
from typing import ClassVar

from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_config import BlockConfig


@dataclass(frozen=True)
class DFlashConfig(BlockConfig):
    """Config of a DFlash draft."""

    architecture: ClassVar[str] = "DFlashDraftModel"
    projector_types: ClassVar[tuple[str, ...]] = ("dflash",)


class DFlashDraft(BlockDraft[DFlashConfig]):
    """The backbone of block drafters, without heads of its own."""
